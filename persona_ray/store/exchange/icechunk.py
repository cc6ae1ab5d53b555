"""Committed rows as an Icechunk repository, in one commit: arrays and names as in the store, rows without gaps.

The rollout dim counts the rows that are there; the coordinate `rollout` says which row of the store each is. Texts stay
outside, in Parquet. Memory: a few units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from persona_ray.errors import InputError
from persona_ray.spec import FinishReason, ProgressCallback
from persona_ray.store.encoding import zarr_arguments
from persona_ray.store.exchange.target import Exported, files_in, new_folder
from persona_ray.store.exchange.view import StoredRows, View, view_of
from persona_ray.store.layout import ArraySpec, archetype_flags, layer_aliases
from persona_ray.store.reader import StoreReader

Columns = dict[str, npt.NDArray[Any]]


def export_icechunk(
    store: StoreReader, folder: str | Path, *, layers: Sequence[int] | None = None, progress: ProgressCallback = lambda _: None
) -> Exported:
    """An Icechunk repository at `folder` with one commit on `main`; `progress` is told of units.

    Arrays: `activations` (rollout, layer, hidden), the row keys, `response_tokens`, `finish_reason`, and `scores/{name}/score` of
    the judge in force. Raises InputError if icechunk is not installed, for a layer that was not captured, and if `folder` is
    not new or empty.
    """
    if find_spec("icechunk") is None:
        raise InputError("icechunk is not installed: pip install 'persona-ray[exchange]'")
    import icechunk  # noqa: PLC0415

    view = view_of(store, layers)
    with new_folder(folder) as draft:
        repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(draft)))
        session = repository.writable_session("main")
        num_rows = _write(zarr.create_group(session.store, attributes=_attributes(view)), view, progress)
        session.commit(f"persona_ray store, ledger {view.ledger_digest}")
        files = files_in(draft)
    return Exported(folder=str(folder), files=files, rows=num_rows, left_out=dict(view.left_out), ledger_digest=view.ledger_digest)


def _write(group: zarr.Group, view: View, progress: ProgressCallback) -> int:
    """All rows; answers how many there are."""
    most = sum(view.markers[unit].num_stored for unit in view.units)
    arrays = {name: _create(group, spec) for name, spec in _specs(view, most).items()}
    layers = _spec("layer", ("layer",), (len(view.layers),), "int64", -1, (len(view.layers),), layer_aliases())
    _create(group, layers)[...] = np.array(view.layers, dtype=np.int64)
    num_rows = 0
    for block in _blocks(view, progress):
        rows = slice(num_rows, num_rows + len(block["rollout"]))
        for name, array in arrays.items():
            array[rows] = block[name]
        num_rows = rows.stop
    for array in arrays.values():
        array.resize((num_rows, *array.shape[1:]))
    return num_rows


def _blocks(view: View, progress: ProgressCallback) -> Iterator[Columns]:
    """The rows in blocks of a unit's size, so that each object is written once, although units have gaps."""
    size = _block_rows(view)
    waiting: Columns = {}
    for unit in view.rows(progress):
        columns = _columns(view, unit)
        waiting = {name: np.concatenate([waiting[name], values]) for name, values in columns.items()} if waiting else columns
        while len(waiting["rollout"]) >= size:
            yield {name: values[:size] for name, values in waiting.items()}
            waiting = {name: values[size:] for name, values in waiting.items()}
    if len(waiting["rollout"]):
        yield waiting


def _columns(view: View, unit: StoredRows) -> Columns:
    codes = {name: code for code, name in enumerate(view.store.archetypes)}
    keys = [rollout.key for rollout in unit.rollouts]
    columns: Columns = {
        "rollout": np.array([rollout.index for rollout in unit.rollouts], dtype=np.int64),
        "archetype": np.array([codes[key.archetype] for key in keys], dtype=np.int32),
        "system_prompt": np.array([key.system_prompt for key in keys], dtype=np.int32),
        "question": np.array([key.question for key in keys], dtype=np.int32),
        "sample": np.array([key.sample for key in keys], dtype=np.int32),
        "turn": np.array([key.turn for key in keys], dtype=np.int32),
        "response_tokens": np.array([rollout.response_end - rollout.response_start for rollout in unit.rollouts], dtype=np.int32),
        "finish_reason": np.array([rollout.finish_reason for rollout in unit.rollouts], dtype=np.int8),
        "activations": unit.activations_RLD,
    }
    return columns if view.judge is None else {**columns, f"scores/{view.judge}/score": unit.score_R}


def _specs(view: View, num_rows: int) -> dict[str, ArraySpec]:
    """Arrays with a rollout dim, in blocks as the store's units are."""
    size, num_layers, width = _block_rows(view), len(view.layers), view.store.hidden_size
    archetypes = {**archetype_flags(view.store.archetypes), "default_archetypes": list(view.store.default_archetypes)}
    reasons = {"flag_values": [int(reason) for reason in FinishReason], "flag_meanings": " ".join(r.name.lower() for r in FinishReason)}
    columns: dict[str, tuple[str, Mapping[str, Any]]] = {
        "rollout": ("int64", {"long_name": "row of the store"}),
        "archetype": ("int32", {"long_name": "character that was asked for", **archetypes}),
        **{name: ("int32", {}) for name in ("system_prompt", "question", "sample", "turn")},
        "response_tokens": ("int32", {"long_name": "tokens of the answer that were pooled"}),
        "finish_reason": ("int8", {"long_name": "why the answer ended", **reasons}),
        **({f"scores/{view.judge}/score": ("int8", {"long_name": "0 to 3; -1: not scored"})} if view.judge is not None else {}),
    }
    specs = {name: _spec(name, ("rollout",), (num_rows,), dtype, -1, (size,), about) for name, (dtype, about) in columns.items()}
    numbers = {"long_name": "residual stream after each decoder block, mean over the tokens of the answer"}
    shape, chunks = (num_rows, num_layers, width), (size, 1, width)
    whole = _spec("activations", ("rollout", "layer", "hidden"), shape, "float32", float("nan"), chunks, numbers)
    return {**specs, "activations": replace(whole, shards=(size, num_layers, width))}


def _spec(
    name: str, dims: tuple[str, ...], shape: tuple[int, ...], dtype: str, fill: float, chunks: tuple[int, ...], about: Mapping[str, Any]
) -> ArraySpec:
    return ArraySpec(name=name, dims=dims, shape=shape, dtype=dtype, fill=fill, chunks=chunks, attributes=about)


def _create(group: zarr.Group, spec: ArraySpec) -> zarr.Array[Any]:
    return group.create_array(spec.name, **zarr_arguments(spec))


def _block_rows(view: View) -> int:
    return int(view.store.identity["unit_rows"])


def _attributes(view: View) -> dict[str, Any]:
    return {
        "title": "persona_ray activations",
        "ledger_digest": view.ledger_digest,
        "identity": view.store.identity,
        "job": view.store.job,
        "judge": view.judge,
        "layer_aliases": layer_aliases(),
    }
