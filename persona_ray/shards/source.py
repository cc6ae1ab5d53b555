"""Where a model's files are, and what its config says. Knows nothing about weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from persona_ray.config import ModelConfig
from persona_ray.errors import InputError
from persona_ray.spec import digest_of

BUILTIN = "builtin:"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What planning needs to know of a model."""

    num_layers: int
    hidden_size: int
    max_positions: int | None
    """Longest conversation, in tokens, that the model has positions for."""
    revision: str | None
    """Commit of a hub model, also where the job named none; a folder has no revision."""
    config_digest: str
    attention: str
    """Kernel that will be used, after `auto` was decided."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer, by the model's own files."""


def model_location(model_id: str) -> str:
    """Folder or hub name that transformers understands. Raises InputError for a folder that is no model."""
    if model_id.startswith(BUILTIN):
        return str(_builtin_folder(model_id.removeprefix(BUILTIN)))
    folder = Path(model_id).expanduser()
    if folder.exists() or model_id.startswith((".", "/", "~")):
        if not (folder / "config.json").is_file():
            raise InputError(f"model.id: {model_id} is not a model folder (no config.json in it)")
        return str(folder.resolve())
    return model_id


def _builtin_folder(name: str) -> Path:
    root = resources.files("persona_ray") / "data"
    folder = Path(str(root / name))
    if not (folder / "config.json").is_file():
        raise InputError(f"model.id: {BUILTIN}{name} is not shipped with this package; builtin:tiny-persona is")
    return folder


def model_facts(model: ModelConfig) -> ModelFacts:
    """Sizes, kernel and stop tokens, from the config alone. Raises InputError if there is no such model, or it is no decoder."""
    config = read_config(model)
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        raise InputError(f"model.id: {model.id}: {type(config).__name__} does not describe a stack of decoder blocks")
    return ModelFacts(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        revision=getattr(config, "_commit_hash", None) or model.revision,
        config_digest=digest_of(_semantic(config)),
        attention=choose_attention(config, model.attention),
        stop_ids=_stop_ids(model, config),
    )


def read_config(model: ModelConfig) -> PretrainedConfig:
    """The text decoder's config."""
    location = model_location(model.id)
    try:
        config = AutoConfig.from_pretrained(location, revision=model.revision)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(f"model.id: {model.id} cannot be opened as a model: {first_line}") from error
    text_config: PretrainedConfig = config.get_text_config(decoder=True)
    return text_config


def choose_attention(config: PretrainedConfig, wanted: str) -> str:
    """The model's own semantics first: a logit softcap (Gemma 2) exists in the eager kernel alone, and sdpa drops it silently."""
    has_softcap = getattr(config, "attn_logit_softcapping", None) is not None
    if wanted == "auto":
        return "eager" if has_softcap else "sdpa"
    if has_softcap and wanted == "sdpa":
        raise InputError("model.attention: sdpa drops this model's attention softcap without notice; use auto or eager")
    return wanted


def _semantic(config: PretrainedConfig) -> dict[str, Any]:
    """The config without what says nothing about the model's numbers: paths and library versions."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in values.items() if key not in {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}}


def _stop_ids(model: ModelConfig, config: PretrainedConfig) -> tuple[int, ...]:
    """Both files are asked: either may name only some of them, or be missing."""
    try:
        generation = GenerationConfig.from_pretrained(model_location(model.id), revision=model.revision).eos_token_id
    except OSError:  # a model without generation_config.json
        generation = None
    found = [ids if isinstance(ids, list) else [ids] for ids in (generation, getattr(config, "eos_token_id", None)) if ids is not None]
    return tuple(sorted({int(token) for ids in found for token in ids}))
