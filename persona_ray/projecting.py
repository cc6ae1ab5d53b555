"""Any store's rows on any axis: where the axis comes from, which layers, and one pass over the rows in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from persona_ray.config import Job, overridden, parse_job
from persona_ray.errors import InputError
from persona_ray.reduce.projection import Direction, Projected, Spreads, Target, nth_answers
from persona_ray.spec import Float64, ProgressCallback, Reduced, ScoredRows
from persona_ray.store.exchange.axis_file import is_axis_file, read_axis_file
from persona_ray.store.exchange.table_file import Columns, table_file
from persona_ray.store.layout import planned_columns
from persona_ray.store.reader import StoreReader
from persona_ray.store.reference import open_result
from persona_ray.store.rows import Rows

MAX_CONVERSATION_TOKENS = 8_192
"""Of conversations with many turns, unless the command line says otherwise; a longer one is refused, never cut."""
SCHEMA = pa.schema(
    [
        pa.field("rollout", pa.int64(), nullable=False),
        pa.field("archetype", pa.string(), nullable=False),
        *(pa.field(name, pa.int32(), nullable=False) for name in ("system_prompt", "question", "sample", "turn", "layer")),
        pa.field("projection", pa.float64(), nullable=False),
        pa.field("position", pa.float64()),
        pa.field("score", pa.int8(), nullable=False),
    ]
)
"""One line for each row and layer. `projection` in units of the residual stream; `position`: 0 = mean role, 1 = default Assistant."""


def open_target(reference: str, component: int | None = None) -> Target:
    """The axis, or a principal component (1 is PC1), of `reference`: STORE, STORE@NAME, or a .safetensors or .pt file.

    Raises InputError if it is not there.
    """
    return _target_in_file(reference, component) if is_axis_file(reference) else _target_of_result(reference, component)


def chosen_layers(target: Target, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Those asked for, or the recommended one. Raises InputError for one that the axis does not have."""
    wanted = (target.layer,) if layers is None else tuple(layers)
    missing = [layer for layer in wanted if layer not in target.direction.layers]
    if missing:
        raise InputError(f"{target.source}: there is no layer {missing[0]}; there are {list(target.direction.layers)}")
    return wanted


def require_width(target: Target, hidden_size: int, where: str) -> None:
    """Raises InputError if rows of that width cannot be projected."""
    width = target.direction.vector_LD.shape[-1]
    if width != hidden_size:
        raise InputError(f"{target.source} has hidden size {width}, and {where} has {hidden_size}: an axis serves its own model only")


def project_store(
    store: StoreReader,
    target: Target,
    layers: Sequence[int] | None = None,
    *,
    out: Path | None = None,
    advance: ProgressCallback = lambda _: None,
) -> Projected:
    """All committed, stored rows of `store` on `target`, whatever their score; each row and layer as a line of `out`, if there is one.

    `advance` is told of rows. Raises InputError, with nothing written, for layers that one side lacks, another hidden size, a file that
    cannot be written, and a store without rows.
    """
    wanted = chosen_layers(target, layers)
    require_width(target, store.hidden_size, store.url)
    missing = [layer for layer in wanted if layer not in store.layers]
    if missing:
        raise InputError(f"{store.url}: layer {missing[0]} was not captured; there are {list(store.layers)}, choose with --layers")
    rows = store.rows(wanted)
    if not len(rows):
        raise InputError(f"{store.url}: no committed row has the layers {list(wanted)} yet")
    found = Projected(
        target=target,
        layers=wanted,
        spreads=Spreads(),
        direction=target.direction.at(wanted),
        archetypes=store.archetypes,
        default_archetypes=store.default_archetypes,
        num_rows=len(rows),
        notes=_notes(store, target),
    )
    answer_N = nth_answers(planned_columns(store.plans))[rows.rollout_N]
    with table_file(out, SCHEMA) if out is not None else nullcontext(_nowhere) as write:
        for part in rows.stream():
            at_R = np.searchsorted(rows.rollout_N, part.rollout_R)
            projection_RL = found.direction.project(part.activations_RLD)
            found.spreads.add(projection_RL, part.archetype_R, answer_N[at_R])
            write(_lines(found, rows, at_R, part, projection_RL))
            advance(len(at_R))
    return found


def conversations_job(path: Path, model_id: str, layers: Sequence[int], url: str, *, on_cpu: bool, overrides: Sequence[str] = ()) -> Job:
    """The job that measures conversations (published layout) with a model, at `layers`, into the store at `url`.

    `overrides`: `key.sub=value`, as for any job. Raises InputError.
    """
    document: dict[str, Any] = {
        "name": "conversations",
        "model": {"id": model_id},
        "shards": {"gpus_per_shard": 0} if on_cpu else {},
        "rollouts": {"source": "import", "path": str(path)},
        "capture": {"layers": list(layers), "max_length": MAX_CONVERSATION_TOKENS},
        "store": {"url": url, "dtype": "float32"},
        "reduce": {"checkpoint_rows": None},
    }
    return parse_job(overridden(document, overrides), where="project")


def _target_of_result(reference: str, component: int | None) -> Target:
    store, reduced = open_result(reference)
    layer = reduced.attributes.get("best_layer")
    if layer not in reduced.layers:
        raise InputError(f"{reference}: the result {reduced.name} recommends no layer; reduce the store again")
    return Target(
        source=reference,
        result=reduced.name,
        component=component,
        model_id=str(store.identity["model_id"]),
        direction=_direction(reference, reduced, component),
        layer=layer,
        reason=str(reduced.attributes.get("best_layer_reason") or "recommended by the result"),
    )


def _direction(reference: str, reduced: Reduced, component: int | None) -> Direction:
    axis_LD = reduced.axis_LD.astype(np.float64)
    if component is None:
        return Direction(layers=reduced.layers, vector_LD=axis_LD, mean_role_LD=reduced.default_vector_LD - axis_LD)
    num_components = reduced.pca_components_LKD.shape[1]
    if not 1 <= component <= num_components:
        raise InputError(f"{reference}: there is no component {component}; there are 1 to {num_components}")
    vector_LD = reduced.pca_components_LKD[:, component - 1].astype(np.float64)
    # Of scaled vectors the component is a direction of scaled dims.
    return Direction(layers=reduced.layers, vector_LD=vector_LD if reduced.pca_scale_LD is None else vector_LD * reduced.pca_scale_LD)


def _target_in_file(file: str, component: int | None) -> Target:
    found = read_axis_file(file, component)
    vector_LD, default_LD = found.vector_LD.astype(np.float64), found.default_vector_LD
    layer = found.layers[len(found.layers) // 2]
    numbers = "" if found.are_layers_named else "; the file does not name its layers, they are counted from 0"
    return Target(
        source=file,
        result=None,
        component=component,
        model_id=found.model_id,
        direction=Direction(layers=found.layers, vector_LD=vector_LD, mean_role_LD=None if default_LD is None else default_LD - vector_LD),
        layer=layer,
        reason=f"layer {layer} is the middle one; a file recommends none{numbers}",
    )


def _notes(store: StoreReader, target: Target) -> tuple[str, ...]:
    model_id = str(store.identity["model_id"])
    if target.model_id is None:
        return (f"{target.source} does not say which model it belongs to; these rows are of {model_id}",)
    return (f"the rows are of {model_id}, what they are projected on of {target.model_id}",) if model_id != target.model_id else ()


def _nowhere(_: Columns) -> None:
    """No file is asked for."""


def _lines(found: Projected, rows: Rows, at_R: npt.NDArray[np.intp], part: ScoredRows, projection_RL: Float64) -> Mapping[str, Any]:
    """One line for each row and layer, row by row."""
    num_layers = len(found.layers)
    place_RL = found.direction.places(projection_RL)
    names = np.array(found.archetypes, dtype=object)[part.archetype_R]
    of_row: dict[str, npt.NDArray[Any]] = {"rollout": part.rollout_R, "archetype": names, "score": part.score_R}
    of_row |= {name: rows.columns[name][at_R] for name in ("system_prompt", "question", "sample", "turn")}
    return {
        **{name: np.repeat(values, num_layers) for name, values in of_row.items()},
        "layer": np.tile(np.array(found.layers, dtype=np.int32), len(at_R)),
        "projection": projection_RL.ravel(),
        "position": pa.nulls(projection_RL.size, pa.float64()) if place_RL is None else place_RL.ravel(),
    }
