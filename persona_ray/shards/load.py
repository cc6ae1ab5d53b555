"""Load one pipeline stage of a causal language model: `from_pretrained` on a subclass whose other blocks are pruned.

The subclass's constructor, which transformers runs on the meta device, replaces everything outside the stage by a
pass-through, so nothing pruned is ever allocated or read, while weight conversion, tied weights and device placement
stay the library's. Blocks are replaced in place, not removed: layer types, layer indices, rotary and sliding-window
rules and caches all keep their numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from persona_ray.errors import InputError, IntegrityError

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "ln_f")


class PassThrough(nn.Identity):
    """Stands where a pruned module stood and hands on its first argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return args[0] if args else next(iter(kwargs.values()))


class _KeyOwner:
    """Tells transformers' loading report whose a checkpoint key is: 0 this stage's, 1 another's. Stands for its PipelineStage."""

    pp_size, pp_rank = 2, 0

    def __init__(self, prefix: str, first_layer: int, end_layer: int, num_layers: int) -> None:
        self._prefix = f"{prefix}."
        self._layers = range(first_layer, end_layer)
        self._is_first, self._is_last = first_layer == 0, end_layer == num_layers

    def find_rank_for_key(self, key: str, num_layers: int, prefix: str) -> int | None:  # noqa: ARG002
        name = key.removeprefix(self._prefix)
        if name.startswith("layers."):
            return 0 if int(name.split(".")[1]) in self._layers else 1
        if name.startswith("embed_tokens."):
            return 0 if self._is_first else 1
        if name.startswith("norm.") or key.startswith("lm_head."):
            return 0 if self._is_last else 1
        return None


def _child_name(parent: nn.Module, module: nn.Module) -> str:
    return next(name for name, child in parent.named_children() if child is module)


def _final_norm_name(base: nn.Module) -> str:
    """A wrong guess would change every number, so an unknown name is an error."""
    for name in FINAL_NORMS:
        if hasattr(base, name):
            return name
    raise InputError(f"{type(base).__name__} cannot be cut into stages: no known final norm among its parts")


def stage_class(cls: type[PreTrainedModel], first_layer: int, end_layer: int) -> type[PreTrainedModel]:
    """Subclass of `cls` that keeps decoder blocks [first_layer, end_layer) and passes through all others."""

    class Stage(cls):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _prune(self, first_layer, end_layer)

    # Same name and same module: transformers takes a class of another module for custom code, which gets no weight conversions.
    Stage.__name__, Stage.__qualname__, Stage.__module__ = cls.__name__, cls.__qualname__, cls.__module__
    return Stage


def _prune(model: Any, first_layer: int, end_layer: int) -> None:
    base: Any = getattr(model, model.base_model_prefix, None)
    if not hasattr(base, "layers"):
        raise InputError(
            f"{type(model).__name__} cannot be cut into stages: its decoder blocks are not at {model.base_model_prefix}.layers"
        )
    num_layers = len(base.layers)
    is_first, is_last = first_layer == 0, end_layer == num_layers
    for layer in range(num_layers):
        if not first_layer <= layer < end_layer:
            base.layers[layer] = PassThrough()
    is_tied = bool(model.all_tied_weights_keys)
    if not (is_first or (is_last and is_tied)):  # a tied head needs the embedding on the last stage
        setattr(base, _child_name(base, model.get_input_embeddings()), PassThrough())
    if not is_last:
        setattr(base, _final_norm_name(base), PassThrough())
        setattr(model, _child_name(model, model.get_output_embeddings()), PassThrough())
        model.all_tied_weights_keys = {}
    model._pp_stage = _KeyOwner(model.base_model_prefix, first_layer, end_layer, num_layers)  # noqa: SLF001


def load_stage(
    location: str, first_layer: int, end_layer: int, *, revision: str | None, dtype: str, attention: str, device: str
) -> PreTrainedModel:
    """The stage with its weights on `device`, in eval mode.

    Raises InputError for a model that cannot be cut, IntegrityError if any of the stage's weights is not in the checkpoint.
    """
    config = AutoConfig.from_pretrained(location, revision=revision)
    try:
        cls = AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001
    except KeyError as error:
        raise InputError(f"model.id: {location}: {type(config).__name__} has no causal language model in transformers") from error
    try:
        model, info = stage_class(cls, first_layer, end_layer).from_pretrained(
            location,
            revision=revision,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            device_map={"": device},
            output_loading_info=True,
        )
    except (OSError, SafetensorError) as error:
        raise InputError(f"model.id: {location}: its weights cannot be read: {str(error).strip().splitlines()[0]}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise IntegrityError(
            f"{location}, layers [{first_layer}, {end_layer}): weights missing or of another shape: {', '.join(missing[:4])}"
            f"{' ...' if len(missing) > 4 else ''}. The checkpoint is incomplete, or the config belongs to another model."
        )
    return model.eval()
