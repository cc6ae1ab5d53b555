"""The arrays of a store: names, dims, dtypes, fills, chunks, attributes. Pure: no I/O, no zarr.

Everything follows from the store's plan file. The rollout dim is whole units long; the rows that pad the last unit have
archetype -1 and keep their fill values for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.spec import NO_ARCHETYPE, FinishReason, Plan, Status
from persona_ray.store.plan_file import PlanFile

PLANNED_CHUNK_ROWS = 65_536
"""Columns known at planning are read whole by everybody: few objects."""

BF16_EXACT = "bf16-exact"
UNIT_COLUMNS = ("response_tokens", "finish_reason", "status")
"""One chunk per unit, in the order of writing; `committed` follows after the marker."""

Columns = dict[str, npt.NDArray[np.generic]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArraySpec:
    """One Zarr array, as far as we decide about it."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    fill: float
    chunks: tuple[int, ...]
    """What is read at once."""
    shards: tuple[int, ...] | None = None
    """What is written as one object; None = the chunk is the object."""
    attributes: Mapping[str, Any] = field(default_factory=dict)


def padded_rows(plan: Plan) -> int:
    """Length of the rollout dim."""
    return plan.num_units * plan.unit_rows


def unit_arrays(header: PlanFile) -> dict[str, ArraySpec]:
    """The arrays that units are written into: one object per unit and array."""
    num_layers, width = len(header.layers), header.hidden_size
    unit_rows, num_rows = header.plan.unit_rows, padded_rows(header.plan)

    def column(name: str, dtype: str, fill: int, attributes: Mapping[str, Any]) -> ArraySpec:
        return ArraySpec(
            name=name, dims=("rollout",), shape=(num_rows,), dtype=dtype, fill=fill, chunks=(unit_rows,), attributes=attributes
        )

    activations = ArraySpec(
        name="activations",
        dims=("rollout", "layer", "hidden"),
        shape=(num_rows, num_layers, width),
        dtype="float32",
        fill=float("nan"),
        chunks=(unit_rows, 1, width),
        shards=(unit_rows, num_layers, width),
        attributes=_activation_attributes(header.identity),
    )
    columns = (
        column("response_tokens", "int32", 0, {"long_name": "tokens of the answer that were pooled", "units": "1"}),
        column("finish_reason", "int8", -1, {"long_name": "why the answer ended; -1: not written", **_flags(FinishReason)}),
        column("status", "int8", -1, {"long_name": "what became of the row; -1: not written", **_flags(Status)}),
        column("committed", "int8", 0, {"long_name": "1: the row's unit has its marker in _commits", "units": "1"}),
    )
    return {spec.name: spec for spec in (activations, *columns)}


def planned_arrays(header: PlanFile) -> list[tuple[ArraySpec, npt.NDArray[np.generic]]]:
    """Coordinates and planned columns, with their values."""
    plan = header.plan
    num_rows, chunk_rows = padded_rows(plan), _planned_chunk(plan)
    attributes = _planned_attributes(plan)
    columns = [
        (
            ArraySpec(
                name=name,
                dims=("rollout",),
                shape=(num_rows,),
                dtype=values.dtype.name,
                fill=NO_ARCHETYPE,
                chunks=(chunk_rows,),
                attributes=attributes[name],
            ),
            values,
        )
        for name, values in planned_columns(plan).items()
    ]
    layers = np.array(header.layers, dtype=np.int64)
    return [*columns, (coordinate("layer", layers, layer_aliases()), layers)]


def planned_columns(plan: Plan) -> Columns:
    """`rollout` (int64) and the parts of the row keys (int32), each of the length of the rollout dim; padding is -1."""
    num_rows = padded_rows(plan)
    codes = {name: code for code, name in enumerate(plan.archetypes)}
    parts: dict[str, Sequence[int]] = {
        "archetype": [codes[key.archetype] for key in plan.keys],
        "system_prompt": [key.system_prompt for key in plan.keys],
        "question": [key.question for key in plan.keys],
        "sample": [key.sample for key in plan.keys],
        "turn": [key.turn for key in plan.keys],
    }
    columns: Columns = {"rollout": np.arange(num_rows, dtype=np.int64)}
    for name, values in parts.items():
        column = np.full(num_rows, NO_ARCHETYPE, dtype=np.int32)
        column[: len(values)] = values
        columns[name] = column
    return columns


def coordinate(name: str, values: npt.NDArray[np.generic], attributes: Mapping[str, Any]) -> ArraySpec:
    """A short array that labels its own dim, in one chunk."""
    return ArraySpec(
        name=name, dims=(name,), shape=values.shape, dtype=values.dtype.name, fill=-1, chunks=values.shape, attributes=attributes
    )


def archetype_flags(archetypes: Sequence[str]) -> dict[str, Any]:
    """CF attributes that give archetype codes their names (which hold no white space)."""
    return {"flag_values": list(range(len(archetypes))), "flag_meanings": " ".join(archetypes)}


def layer_aliases() -> dict[str, str]:
    """What layer `l` is called elsewhere."""
    return {
        "long_name": "decoder block, counted from 0; the activation is its output, before any final norm",
        "alias_module": "model.layers[l] output",
        "alias_transformerlens": "blocks.{l}.hook_resid_post",
        "alias_hf_hidden_states": "hidden_states[l+1] (not for the last layer, which HF gives after the final norm)",
        "alias_vllm_aux": "l+1",
    }


def root_attributes(header: PlanFile) -> dict[str, Any]:
    """The attributes of the store's root group."""
    return {
        "title": "persona_ray activations",
        "schema_version": header.schema_version,
        "identity": header.identity,
        "identity_digest": header.identity_digest,
        "plan_digest": header.plan_digest,
        "job": header.job,
        "created": header.created,
        "versions": header.versions,
        "layer_aliases": layer_aliases(),
        "source_dtype": header.identity["dtype"],
    }


def unit_slice(plan: Plan, unit: int) -> slice:
    """The real rows of `unit` on the rollout dim, padding left out."""
    start = (unit - plan.first_unit) * plan.unit_rows
    return slice(start, min(start + plan.unit_rows, len(plan.keys)))


def unit_chunk_key(spec: ArraySpec, unit: int) -> str:
    """Key of the object that holds `unit` of an array of `unit_arrays`."""
    return "/".join((spec.name, "c", str(unit), *("0" for _ in spec.dims[1:])))


def parquet_key(unit: int) -> str:
    """Key of a unit's text."""
    return f"rollouts/part-{unit:06d}.parquet"


def _planned_chunk(plan: Plan) -> int:
    """Rows per chunk: whole units, about equal chunks, so that a further plan on a chunk border wastes next to nothing."""
    num_chunks = max(1, -(-padded_rows(plan) // max(PLANNED_CHUNK_ROWS, plan.unit_rows)))
    return -(-plan.num_units // num_chunks) * plan.unit_rows


def _activation_attributes(identity: Mapping[str, Any]) -> dict[str, Any]:
    exactness = {"exact_in": "bfloat16"} if identity["store_dtype"] == BF16_EXACT else {}
    return {
        "long_name": "residual stream after each decoder block, mean over the tokens of the answer",
        "units": "1",
        "source_dtype": identity["dtype"],
        "store_dtype": identity["store_dtype"],
        **exactness,
    }


def _planned_attributes(plan: Plan) -> dict[str, dict[str, Any]]:
    return {
        "rollout": {"long_name": "row of the store"},
        "archetype": {
            "long_name": "character that was asked for; -1: padding",
            **archetype_flags(plan.archetypes),
            "default_archetypes": list(plan.default_archetypes),
        },
        "system_prompt": {"long_name": "which of the archetype's system prompts; -1: padding"},
        "question": {"long_name": "which extraction question; -1: padding"},
        "sample": {"long_name": "which of several answers to the same; -1: padding"},
        "turn": {"long_name": "index of the answer among the conversation's messages; -1: padding"},
    }


def _flags(codes: type[FinishReason | Status]) -> dict[str, Any]:
    return {"flag_values": [int(code) for code in codes], "flag_meanings": " ".join(code.name.lower() for code in codes)}
