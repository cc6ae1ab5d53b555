"""The arrays of a store: names, dims, dtypes, fills, chunks, attributes. Pure: no I/O, no zarr.

Everything follows from the store's plans. The rollout dim is whole units long; the rows that pad a plan's last unit, and those
between two plans, have archetype -1 and keep their fill values for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.spec import NO_ARCHETYPE, NOT_SCORED, FinishReason, Plan, Status
from persona_ray.store.marker import commits_folder
from persona_ray.store.plans import Plans

BF16_EXACT = "bf16-exact"
PUBLISHED_SPANS = "published"
"""Span rule of rows that were pooled elsewhere: their token ids are not known."""
BFLOAT16 = "bfloat16"
ROUNDED = frozenset({BF16_EXACT, BFLOAT16})
"""`store.dtype` whose values are rounded to bfloat16, in whatever array they are."""
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


def unit_arrays(plans: Plans) -> dict[str, ArraySpec]:
    """The arrays that units are written into, those of every set of layers: one object per unit and array."""
    arrays = [
        _unit_column(plans, "response_tokens", "int32", 0, {"long_name": "tokens of the answer that were pooled", "units": "1"}),
        _unit_column(plans, "finish_reason", "int8", -1, {"long_name": "why the answer ended; -1: not written", **_flags(FinishReason)}),
        _unit_column(plans, "status", "int8", -1, {"long_name": "what became of the row; -1: not written", **_flags(Status)}),
    ]
    for number in range(len(plans.layer_sets)):
        mask = {"long_name": f"1: the row's unit has its marker in {commits_folder(number)}", "units": "1"}
        arrays += [_activations(plans, number), _unit_column(plans, committed_name(number), "int8", 0, mask)]
    return {spec.name: spec for spec in arrays}


def activations_name(layer_set: int) -> str:
    """The array of a set of layers."""
    return _of_set("activations", layer_set)


def committed_name(layer_set: int) -> str:
    """The mask of a set of layers."""
    return _of_set("committed", layer_set)


def layer_name(layer_set: int) -> str:
    """The layer dim of a set of layers, and its coordinate."""
    return _of_set("layer", layer_set)


def score_array(plans: Plans, name: str) -> ArraySpec:
    """The array of judge `name`."""
    meaning = "how far the answer is in its role, 0 (not at all) to 3 (fully); -1: not scored"
    return _unit_column(plans, f"scores/{name}/score", "int8", NOT_SCORED, {"long_name": meaning, "units": "1"})


def planned_arrays(plans: Plans) -> dict[str, ArraySpec]:
    """The columns that are known at planning."""
    dtypes = {"rollout": "int64", **dict.fromkeys(("archetype", "system_prompt", "question", "sample", "turn"), "int32")}
    attributes = _planned_attributes(plans)
    return {
        name: ArraySpec(
            name=name,
            dims=("rollout",),
            shape=(plans.padded_rows,),
            dtype=dtype,
            fill=NO_ARCHETYPE,
            chunks=(plans.chunk_units * plans.unit_rows,),
            attributes=attributes[name],
        )
        for name, dtype in dtypes.items()
    }


def layer_coordinates(plans: Plans) -> Iterator[tuple[ArraySpec, npt.NDArray[np.generic]]]:
    """The labels of each set's layer dim, with their values."""
    for number, layers in enumerate(plans.layer_sets):
        values = np.array(layers, dtype=np.int64)
        yield coordinate(layer_name(number), values, layer_aliases()), values


def planned_chunks(plans: Plans, plan: Plan) -> Iterator[tuple[int, Columns]]:
    """Chunk by chunk of the planned columns, those that belong to `plan`: number and values, each of a chunk's length.

    `rollout` is int64 and counts on in padding; the parts of the row keys are int32, -1 in padding.
    """
    codes = {name: code for code, name in enumerate(plan.archetypes)}
    first_row, chunk_rows = plan.first_unit * plans.unit_rows, plans.chunk_units * plans.unit_rows
    for start in range(0, len(plan.keys), chunk_rows):
        keys = plan.keys[start : start + chunk_rows]
        parts: dict[str, Sequence[int]] = {
            "archetype": [codes[key.archetype] for key in keys],
            "system_prompt": [key.system_prompt for key in keys],
            "question": [key.question for key in keys],
            "sample": [key.sample for key in keys],
            "turn": [key.turn for key in keys],
        }
        columns: Columns = {"rollout": np.arange(first_row + start, first_row + start + chunk_rows, dtype=np.int64)}
        for name, values in parts.items():
            column = np.full(chunk_rows, NO_ARCHETYPE, dtype=np.int32)
            column[: len(values)] = values
            columns[name] = column
        yield (first_row + start) // chunk_rows, columns


def planned_columns(plans: Plans) -> Columns:
    """The planned columns whole, each of the length of the rollout dim."""
    chunk_rows = plans.chunk_units * plans.unit_rows
    whole: Columns = {"rollout": np.arange(plans.padded_rows, dtype=np.int64)}
    for name, spec in planned_arrays(plans).items():
        whole.setdefault(name, np.full(spec.shape, spec.fill, dtype=spec.dtype))
    for file in plans.files:
        for chunk, columns in planned_chunks(plans, file.plan):
            for name, values in columns.items():
                place = whole[name][chunk * chunk_rows : (chunk + 1) * chunk_rows]
                place[...] = values[: len(place)]
    return whole


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


def root_attributes(plans: Plans) -> dict[str, Any]:
    """The attributes of the store's root group."""
    first = plans.first
    return {
        "title": "persona_ray activations",
        "schema_version": max(file.schema_version for file in plans.files),
        "identity": plans.identity,
        "identity_digest": plans.identity_digest,
        "plan_digest": plans.digest,
        "plans": len(plans.files),
        "layer_sets": [list(layers) for layers in plans.layer_sets],
        "units": plans.num_units,
        "rows": plans.num_rows,
        "job": first.job,
        "created": first.created,
        "versions": first.versions,
        "layer_aliases": layer_aliases(),
        "source_dtype": plans.identity["dtype"],
    }


def chunk_key(spec: ArraySpec, chunk: int) -> str:
    """Key of the object that holds place `chunk` of the first dim, whole in all others. A unit array's chunk is a unit."""
    return "/".join((spec.name, "c", str(chunk), *("0" for _ in spec.dims[1:])))


def parquet_key(unit: int) -> str:
    """Key of a unit's text."""
    return f"rollouts/part-{unit:06d}.parquet"


def _of_set(name: str, layer_set: int) -> str:
    return f"{name}_{layer_set}" if layer_set else name


def _activations(plans: Plans, layer_set: int) -> ArraySpec:
    num_layers, width, unit_rows = len(plans.layer_sets[layer_set]), plans.hidden_size, plans.unit_rows
    return ArraySpec(
        name=activations_name(layer_set),
        dims=("rollout", layer_name(layer_set), "hidden"),
        shape=(plans.padded_rows, num_layers, width),
        dtype=BFLOAT16 if plans.identity["store_dtype"] == BFLOAT16 else "float32",
        fill=float("nan"),
        chunks=(unit_rows, 1, width),
        shards=(unit_rows, num_layers, width),
        attributes=_activation_attributes(plans.identity),
    )


def _unit_column(plans: Plans, name: str, dtype: str, fill: int, attributes: Mapping[str, Any]) -> ArraySpec:
    return ArraySpec(
        name=name,
        dims=("rollout",),
        shape=(plans.padded_rows,),
        dtype=dtype,
        fill=fill,
        chunks=(plans.unit_rows,),
        attributes=attributes,
    )


def _activation_attributes(identity: Mapping[str, Any]) -> dict[str, Any]:
    exactness = {"exact_in": "bfloat16"} if identity["store_dtype"] == BF16_EXACT else {}
    return {
        "long_name": "residual stream after each decoder block, mean over the tokens of the answer",
        "units": "1",
        "source_dtype": identity["dtype"],
        "store_dtype": identity["store_dtype"],
        **exactness,
    }


def _planned_attributes(plans: Plans) -> dict[str, dict[str, Any]]:
    return {
        "rollout": {"long_name": "row of the store"},
        "archetype": {
            "long_name": "character that was asked for; -1: padding",
            **archetype_flags(plans.archetypes),
            "default_archetypes": list(plans.default_archetypes),
        },
        "system_prompt": {"long_name": "which of the archetype's system prompts; -1: padding"},
        "question": {"long_name": "which extraction question; -1: padding"},
        "sample": {"long_name": "which of several answers to the same; -1: padding"},
        "turn": {"long_name": "index of the answer among the conversation's messages; -1: padding"},
    }


def _flags(codes: type[FinishReason | Status]) -> dict[str, Any]:
    return {"flag_values": [int(code) for code in codes], "flag_meanings": " ".join(code.name.lower() for code in codes)}
