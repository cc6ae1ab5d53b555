"""What a run of a plan will leave in its store before anybody judges or reduces: every object by key, and how large they will be.

Keys are exact, and so are the sizes of all that follows from the plans alone. Of a unit, the numbers are a share of their raw size
(`STORED_SHARE`), and the text is as large as that of any rows which are like it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from persona_ray.spec import Rollout
from persona_ray.store.address import absolute_url
from persona_ray.store.backend import PROBE_PREFIX
from persona_ray.store.encoding import encode_unit
from persona_ray.store.layers_file import layers_key
from persona_ray.store.layout import (
    BF16_EXACT,
    BFLOAT16,
    UNIT_COLUMNS,
    activations_name,
    chunk_key,
    committed_name,
    parquet_key,
    score_array,
    unit_arrays,
)
from persona_ray.store.marker import Marker, ObjectRecord, marker_key
from persona_ray.store.metadata import store_objects
from persona_ray.store.plan_file import plan_key
from persona_ray.store.plans import Plans
from persona_ray.store.scores import LATEST_SCORES_KEY, raw_key
from persona_ray.store.text import encode_rollouts
from persona_ray.store.writer import padded

STORED_SHARE: Mapping[str, float] = {BF16_EXACT: 0.850, BFLOAT16: 0.845, "float32": 0.925}
"""`store.dtype` -> stored bytes of activations beside the raw ones (2 bytes a value, float32: 4). Measured on the tiny model's
activations and on made-up ones of other widths (README, `jobs/benchmark_store.py`); a few rows of a narrow model take more."""
PROBE = b"persona_ray write probe " + b"0" * 16
MADE = {
    "hardware": "NVIDIA H100 80GB HBM3",
    "attention": "sdpa",
    "stages": 2,
    "tensor_parallel": 1,
    "concurrent_units": 3,
    "versions": {"torch": "2.13.0+cu130", "transformers": "5.23.0", "ray": "2.60.0"},
    "batch_tokens": 32768,
    "tokens": 30000,
    "padded_tokens": 31000,
    "notes": [],
    "seconds": {"rollouts": 10.123, "capture": 1.123},
}
"""What a marker says of how its unit was made: as long as in a run."""
GETS_PER_UNIT = 2
"""At least: before a unit is begun, its marker is looked for, and its text."""
GETS_PER_UNIT_OF_MORE_LAYERS = 3
"""The same, and the marker once more by who finds the text there."""


def unit_keys(plans: Plans, unit: int, layer_set: int = 0) -> tuple[str, ...]:
    """Every object that the writer creates for `unit`, in the order of writing; for further layers the text is there already."""
    arrays = unit_arrays(plans)
    columns = UNIT_COLUMNS if layer_set == 0 else ()
    numbers = [chunk_key(arrays[name], unit) for name in (activations_name(layer_set), *columns)]
    text = [parquet_key(unit)] if layer_set == 0 else []
    return (*text, *numbers, marker_key(unit, layer_set), chunk_key(arrays[committed_name(layer_set)], unit))


def plan_objects(plans: Plans, url: str) -> dict[str, int]:
    """Key -> bytes of every object of the store at `url` besides those of units. In a bucket the write probe stays, too."""
    files = {plan_key(number): file.to_bytes() for number, file in enumerate(plans.files)}
    layers = {layers_key(number): file.to_bytes() for number, file in enumerate(plans.further_layers, start=1)}
    probe = {f"{PROBE_PREFIX}/write-once": PROBE} if is_bucket(url) else {}
    return {key: len(data) for key, data in {**probe, **files, **layers, **store_objects(plans)}.items()}


def is_bucket(url: str) -> bool:
    """Whether the store is in an object storage, which asks money for requests, and not in a folder."""
    return "://" in absolute_url(url)


def unit_bytes(plans: Plans, rollouts: Sequence[Rollout], layer_set: int = 0, stored_share: float | None = None) -> int:
    """All objects of a unit whose rows are like `rollouts`, in bytes. `stored_share`: of raw activations; None: as measured."""
    dtype = plans.identity["store_dtype"]
    arrays, num_rows = unit_arrays(plans), len(rollouts)
    raw = num_rows * len(plans.layer_sets[layer_set]) * plans.hidden_size * (4 if dtype == "float32" else 2)
    activations = round(raw * (STORED_SHARE[dtype] if stored_share is None else stored_share))
    lengths_R = np.array([rollout.response_end - rollout.response_start for rollout in rollouts])
    columns = dict.fromkeys(UNIT_COLUMNS, np.zeros(num_rows)) | {"response_tokens": lengths_R} if layer_set == 0 else {}
    columns[committed_name(layer_set)] = np.ones(num_rows)
    numbers = sum(len(encode_unit(arrays[name], padded(arrays[name], values_R))) for name, values_R in columns.items())
    text = len(encode_rollouts(rollouts)) if layer_set == 0 else 0
    return text + activations + numbers + _marker_bytes(plans, num_rows, layer_set)


def _marker_bytes(plans: Plans, num_rows: int, layer_set: int) -> int:
    """Of a unit without refused rows."""
    *objects, _, _ = unit_keys(plans, plans.units[-1], layer_set)
    marker = Marker(
        unit=plans.units[-1],
        first_row=plans.rows(plans.units[-1]).start,
        num_rows=num_rows,
        objects={key: ObjectRecord(10**6, "0" * 64) for key in [*objects, *([] if layer_set == 0 else [parquet_key(plans.units[-1])])]},
        refused={},
        made=MADE,
        created="2026-01-01T00:00:00+00:00",
    )
    return len(marker.to_bytes())


def score_keys(plans: Plans, unit: int, judge: str) -> tuple[str, ...]:
    """What a judge leaves for a unit."""
    return raw_key(judge, unit), chunk_key(score_array(plans, judge), unit)


def judge_keys(judge: str) -> tuple[str, ...]:
    """What a judge leaves once."""
    groups = ("scores", f"scores/{judge}", f"scores/{judge}/score")
    return (*(f"{group}/zarr.json" for group in groups), LATEST_SCORES_KEY)
