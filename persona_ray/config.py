"""The job file: one YAML document is one complete job, checked by one schema.

Complete, frozen, and closed: every key has a default but `model.id` and `store.url`, unknown keys are refused, and so is
a value whose code does not exist yet. What is checked here needs neither network, weights nor cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from persona_ray.errors import InputError


def _not_yet(*values: object) -> BeforeValidator:
    """Refuses values that the schema names but no code serves."""

    def refuse(value: object) -> object:
        if value in values:
            raise ValueError(f"{value!r} is not available in this version")
        return value

    return BeforeValidator(refuse)


Transport = Literal["object-store", "gloo", "nccl"]
"""How hidden states travel between the stages of a replica."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)


class ModelConfig(_Section):
    """Which model, and how its numbers are computed."""

    id: str = Field(min_length=1, description="Hub name, local folder, or `builtin:tiny-persona` (shipped with the package).")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Number format of the forward pass.")
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto", description="Attention kernel. auto: the fastest of eager and sdpa that has the model's own semantics."
    )
    kind: Literal["instruct", "base"] = Field(
        "instruct", description="base: another model's rollouts are shown to it as a plain-text transcript; it has no chat template."
    )
    trust_remote_code: Annotated[bool, _not_yet(True)] = Field(False, description="Run code that comes with the model.")


class ShardsConfig(_Section):
    """How the model is cut over Ray actors. Never binds a store: any cut gives the same rows."""

    stages: int | Literal["auto"] = Field(
        1, description="Pipeline stages: contiguous decoder blocks. auto: the fewest whose weights fit the accelerator's memory."
    )
    tensor_parallel: int = Field(1, ge=1, description="Ranks of each stage: every one holds a slice of each weight matrix, on one node.")
    replicas: int | Literal["auto"] = Field("auto", description="Copies of the model. auto: as many as the cluster's GPUs hold; 1 on CPU.")
    gpus_per_shard: float = Field(1, ge=0, le=1, description="GPUs of each actor: 1, a part of one that it shares, or 0 = CPU.")
    accelerator: str | None = Field(None, description="Ray accelerator type that every actor needs, e.g. H100.")
    batch_tokens: int | Literal["auto"] = Field("auto", description="Padded tokens per forward batch.")
    transport: Transport = Field(
        "object-store",
        description="How hidden states travel between stages: through Ray's object store (survives a lost stage), "
        "or directly from actor to actor (gloo on CPU, nccl on GPUs; a lost stage then takes its neighbours with it).",
    )

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where the shards compute."""
        return "cuda" if self.gpus_per_shard else "cpu"

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.transport == "nccl" and not self.gpus_per_shard:
            raise ValueError("transport: nccl connects GPUs; on CPUs use gloo or object-store")
        for name in ("stages", "replicas", "batch_tokens"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ValueError(f"{name} must be at least 1, or auto")
        return self


class CatalogConfig(_Section):
    """Which characters are asked what."""

    source: str = Field("builtin", description="builtin, or a folder or file of your own (README: your own catalogue).")
    archetypes: Literal["all"] | tuple[str, ...] = Field(
        "all", description="all, or a list of names. The default Assistant always takes part."
    )
    system_prompts: int = Field(5, ge=1, description="The first n system prompts of every archetype.")
    questions: int = Field(240, ge=1, description="n questions, spread evenly over the catalogue.")
    samples: int = Field(1, ge=1, description="Answers per archetype, system prompt and question.")


class RolloutsConfig(_Section):
    """Where the conversations come from."""

    source: Annotated[Literal["generate", "import", "endpoint"], _not_yet("endpoint")] = "generate"
    path: str | None = Field(
        None, description="Import: folder of {archetype}.jsonl in the published layout, or another run's store (folder or URL)."
    )
    max_new_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.7, ge=0, description="0 = greedy.")
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0 = off.")
    seed: int = Field(0, ge=0)
    thinking: bool = Field(False, description="Chat-template option enable_thinking. Reasoning is kept on record, never measured.")

    @model_validator(mode="after")
    def _import_has_path(self) -> Self:
        if (self.source == "import") != (self.path is not None):
            raise ValueError("path belongs to source: import, and source: import needs a path")
        return self


class EveryNth(_Section):
    """Layers 0, n, 2n, ..."""

    stride: int = Field(ge=1)


class CaptureConfig(_Section):
    """Which activations are kept."""

    layers: Literal["all"] | tuple[int, ...] | EveryNth = Field("all", description="all, a list of decoder blocks, or {stride: n}.")
    max_length: int = Field(2048, ge=2, description="Longer conversations (tokens) are refused, never cut.")

    def wanted_layers(self, num_layers: int) -> Iterable[int]:
        """What `layers` means for a model of `num_layers` decoder blocks; not checked against it."""
        if self.layers == "all":
            return range(num_layers)
        if isinstance(self.layers, EveryNth):
            return range(0, num_layers, self.layers.stride)
        return self.layers


class StoreConfig(_Section):
    """Where the activations go."""

    url: str = Field(min_length=1, description="Folder, file:, s3:, gs: or az: URL; fsspec+s3: for s3: through fsspec.")
    dtype: Literal["bf16-exact", "float32", "bfloat16"] = Field(
        "bf16-exact",
        description="bf16-exact: values rounded to bfloat16 in a float32 array. float32: as computed. bfloat16: the same values and as "
        "many stored bytes as bf16-exact, in an array that TensorStore opens, but zarr and xarray only after "
        "`import persona_ray.store.bfloat16`.",
    )
    unit_rows: int | Literal["auto"] = Field("auto", description="Rows committed together. auto: what fills a shard, at most 256.")
    client: Literal["auto", "obstore", "fsspec"] = Field(
        "auto", description="auto: obstore, or fsspec (s3fs) for a fsspec+s3: URL. fsspec: s3: only; it knows profiles and assumed roles."
    )

    @model_validator(mode="before")
    @classmethod
    def _client_travels_with_the_url(cls, document: object) -> object:
        """`client: fsspec` becomes a part of the URL, which is all that workers, readers and the next command are given."""
        if isinstance(document, dict) and document.get("client") == "fsspec" and str(document.get("url", "")).startswith("s3://"):
            return document | {"url": f"fsspec+{document['url']}"}
        return document

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if self.client == "fsspec" and not self.url.startswith("fsspec+s3://"):
            raise ValueError("client: fsspec needs an s3:// URL; leave client out for folders and other services")
        if self.client == "obstore" and self.url.startswith("fsspec+"):
            raise ValueError("client is obstore, but the URL begins with fsspec+; leave one of them out")
        if self.url.startswith("memory:"):
            raise ValueError("a memory: store lives in one process only; give a folder or an object-store URL")
        if self.unit_rows != "auto" and self.unit_rows < 1:
            raise ValueError("unit_rows must be at least 1, or auto")
        return self


class JudgeConfig(_Section):
    """Who says how far an answer is in its role."""

    backend: Annotated[Literal["none", "scores", "lexicon", "endpoint", "local"], _not_yet("endpoint", "local")] = "none"
    path: str | None = Field(None, description="scores: folder of {archetype}.json; lexicon: a JSON file (default: the model's own).")

    @model_validator(mode="after")
    def _path_fits(self) -> Self:
        if self.backend == "scores" and self.path is None:
            raise ValueError("backend scores needs a path: a folder of {archetype}.json")
        if self.backend == "none" and self.path is not None:
            raise ValueError("path is set, but backend is none")
        return self


class StopConfig(_Section):
    """A run ends when its axis holds still, on the longest complete prefix of the work order."""

    cosine: float = Field(0.999, gt=0, lt=1, description="With the axis of the look before, and expected with that of endlessly many rows.")
    patience: int = Field(3, ge=1, description="Looks in a row that must find it so; each has a tenth more rows than the one before.")
    min_per_archetype: int = Field(10, ge=1, description="Rows of every archetype before the first look.")
    layers: tuple[int, ...] | None = Field(None, min_length=1, description="Captured layers that are looked at; null: the middle one.")


class ExtraConfig(_Section):
    """Further answers of archetypes whose vector is uncertain, or whose filter passes few: a plan of their own, after all others."""

    rows: int = Field(100, ge=1, description="For each such archetype, in all; further samples of the job's prompts and questions.")
    max_error: float = Field(
        0.1,
        gt=0,
        description="Standard error of a role vector, over its distance from the mean role vector, at the recommended layer; "
        "of the default vector over the length of the axis.",
    )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {"min_score": 3, "min_count": 10, "somewhat": True},
    "published-code": {"min_score": 3, "min_count": 50, "somewhat": False},
}
"""What a preset says where the job does not."""


MIN_REPLICATES = 20


class ReduceConfig(_Section):
    """From rows to directions. A preset gives the values of the keys that the job leaves out."""

    preset: Literal["paper", "published-code"] = Field(
        "paper", description="published-code: the released code's filter, and its rounding to bfloat16 at every step."
    )
    min_score: int = Field(3, ge=0, le=3, description="Rows of a role vector need at least this score; ignored without a judge.")
    min_count: int = Field(10, ge=1, description="An archetype with fewer such rows has no role vector. published-code: 50.")
    somewhat: bool = Field(
        True, description="Components also over vectors of score 2 exactly, as in the paper; never the axis. published-code: false."
    )
    pca: Literal["plain", "standardised", "masked"] = Field(
        "plain", description="Components of role vectors as they are, of their dims over their standard deviation, or without massive dims."
    )
    rank: int = Field(64, ge=1, description="Principal components kept, at most.")
    rollout_pca: Literal["incremental", "none"] = Field(
        "incremental", description="Components of single rollouts, too, of all stored rows: incremental PCA in the same pass; or none."
    )
    exact_layers: tuple[int, ...] = Field(
        (), description="Layers whose components of single rollouts are exact, by their scatter: hidden size squared x 8 bytes of memory."
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto",
        description="What computes components of rollouts in `persona-ray reduce`. auto: free GPUs, if there are any. "
        "A run leaves its GPUs to the model.",
    )
    bootstrap: int = Field(
        200, ge=0, description="Bootstrap replicates (by question) for error bars; 0: none. They read one layer again, twice."
    )
    checkpoint_rows: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        "auto",
        description="Rows after which the statistics are kept in the store, so that nothing reads these rows again. "
        "auto: 200 for each archetype; null: never.",
    )
    stop: StopConfig | None = Field(None, description="When a run ends before its plan does; null: never.")
    extra: ExtraConfig | None = Field(
        None,
        description="Further rows where the planned ones leave a vector uncertain; null: none. With limits, the run that finds everything "
        "else done takes them.",
    )

    @model_validator(mode="after")
    def _exact_ones_are_asked_for(self) -> Self:
        if 0 < self.bootstrap < MIN_REPLICATES:
            raise ValueError(f"bootstrap is 0 (no error bars), or at least {MIN_REPLICATES} replicates, of which a tail can be told")
        if self.exact_layers and self.rollout_pca == "none":
            raise ValueError("exact_layers are components of single rollouts; they need rollout_pca: incremental")
        return self

    @model_validator(mode="before")
    @classmethod
    def _as_the_preset_says(cls, given: Any) -> Any:
        return {**PRESETS.get(str(given.get("preset", "paper")), {}), **given} if isinstance(given, dict) else given


class LimitsConfig(_Section):
    """Where a run stops cleanly: what is under way is finished, judged and reduced. The same command goes on from there."""

    hours: float | None = Field(None, gt=0, description="Wall time after which no unit is begun any more.")
    rows: int | None = Field(None, ge=1, description="Rows that one run adds, at most: the first ones in work order, in whole units.")
    money: float | None = Field(None, gt=0, description="What the run's GPUs may cost; over that, no unit is begun any more.")
    gpu_hour_price: float | None = Field(
        None, gt=0, description="Of one GPU (on CPU: of one shard) for an hour. null: a list price of shards.accelerator, in US dollars."
    )


class Job(_Section):
    """One complete job."""

    name: str = Field("persona-ray", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: ModelConfig
    shards: ShardsConfig = ShardsConfig()
    catalog: CatalogConfig = CatalogConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    capture: CaptureConfig = CaptureConfig()
    store: StoreConfig
    judge: JudgeConfig = JudgeConfig()
    reduce: ReduceConfig = ReduceConfig()
    limits: LimitsConfig = LimitsConfig()

    @model_validator(mode="after")
    def _base_models_do_not_answer(self) -> Self:
        if self.model.kind == "base" and self.rollouts.source != "import":
            raise ValueError("model.kind: base needs rollouts.source: import, another model's rollouts: a base model does not answer")
        if self.reduce.extra is not None and self.rollouts.source == "import":
            raise ValueError("reduce.extra asks for further answers, and rollouts.source: import has none; leave it null")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return self.model_dump(mode="json")


def job_schema() -> dict[str, Any]:
    """The job file's JSON Schema, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Job.model_json_schema()}


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The job in the YAML file at `path`, with `key.sub=value` overrides (values are YAML). Raises InputError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a job file ({error})") from error
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # a date that does not exist is a ValueError
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: a job file is a YAML mapping with at least model and store")
    return parse_job(overridden(document, overrides), where=str(path))


def overridden(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`document` itself, with `key.sub=value` overrides (values are YAML). Raises InputError."""
    for override in overrides:
        _apply(document, override)
    return document


def reduce_config(settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> ReduceConfig:
    """A job's `reduce` section, with overrides `reduce.key=value`; one of the preset leaves the section's other settings out.

    Raises InputError.
    """
    stranger = next((override for override in overrides if not override.startswith("reduce.")), None)
    if stranger is not None:
        raise InputError(f"--set {stranger}: only keys of reduce can be replaced here, for example --set reduce.min_count=5")
    has_preset = any(override.startswith("reduce.preset=") for override in overrides)
    document = overridden({"reduce": {} if has_preset else dict(settings)}, overrides)
    return parse_job({"model": {"id": "any"}, "store": {"url": "any"}, **document}, where="--set").reduce


def parse_job(document: Mapping[str, Any], where: str = "job") -> Job:
    """`document` as a job, or InputError with one line that names the key."""
    try:
        return Job.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{where}: {_in_words(error)}") from error


def _apply(document: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise InputError(f"--set {override}: expected key=value, for example --set shards.stages=2")
    *parents, last = key.split(".")
    section = document
    for parent in parents:
        child = section.setdefault(parent, {})
        if child is None:  # a section that was left out, as stop: null
            child = section[parent] = {}
        if not isinstance(child, dict):
            raise InputError(f"--set {override}: {parent} is not a section")
        section = child
    try:
        section[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--set {override}: the value is not YAML") from error


_COMPLAINTS = {
    "extra_forbidden": "unknown key",
    "missing": "is required",
}


def _in_words(error: ValidationError) -> str:
    """The first complaint of every wrong key, on one line."""
    complaints: dict[str, str] = {}
    for item in error.errors():
        place = ".".join(str(part) for part in item["loc"] if not _is_union_member(part))
        text = _COMPLAINTS.get(item["type"]) or item["msg"].removeprefix("Value error, ")
        complaints.setdefault(place or "job", text[:1].lower() + text[1:])
    return "; ".join(f"{place}: {text}" for place, text in complaints.items())


def _is_union_member(part: int | str) -> bool:
    """Pydantic puts the tried member of a union into the path; people did not write it."""
    return isinstance(part, str) and (part.startswith(("literal[", "tuple[", "function-")) or part in {"int", "str", "none", "EveryNth"})
