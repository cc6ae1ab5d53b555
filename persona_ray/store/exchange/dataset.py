"""A store as a Hugging Face dataset: a row is a rollout, with its texts, its score, its token counts and, if asked for, activations.

Each layer is a column of its own, so that a reader who wants one layer reads that one, and a viewer sees a few columns, not
a thousand. Memory: a row group and a few units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona_ray.spec import NOT_SCORED, ProgressCallback, Rollout
from persona_ray.store.exchange.cards import base_model, header, provenance, shown_layers, table
from persona_ray.store.exchange.target import Exported, files_in, new_folder
from persona_ray.store.exchange.view import StoredRows, View, view_of
from persona_ray.store.reader import StoreReader
from persona_ray.store.text import ROLLOUT_COLUMNS

ROW_GROUP_BYTES = 64 << 20
"""Decoded; the hub's viewer reads a row group at a time and wants less than 300 MB."""
SHARD_BYTES = 400 << 20
"""On disk; the hub asks for less than 500 MB a file."""

_LEFT_OUT = frozenset({"token_ids", "response_start", "response_end", "refusal"})
"""Columns of the store's text that are of use beside the store alone."""
_COLUMNS: tuple[tuple[str, pa.DataType, Callable[[Rollout], Any]], ...] = (
    *(column for column in ROLLOUT_COLUMNS if column[0] not in _LEFT_OUT),
    ("num_tokens", pa.int32(), lambda rollout: len(rollout.token_ids)),
    ("response_tokens", pa.int32(), lambda rollout: rollout.response_end - rollout.response_start),
)


def export_dataset(
    store: StoreReader, folder: str | Path, *, layers: Sequence[int] = (), progress: ProgressCallback = lambda _: None
) -> Exported:
    """Committed rows as Parquet shards with a dataset card; `datasets.load_dataset(folder)` opens it. `progress` is told of units.

    `layers`: decoder blocks whose activations come along as float32 lists of the model's width, `activations_layer_{l}`. Raises
    InputError for a layer that was not captured, and if `folder` is not new or empty.
    """
    view = view_of(store, layers)
    with new_folder(folder) as draft:
        shards = _Shards(draft / "data", _schema(view))
        for unit in view.rows(progress):
            shards.add(_table(view, unit, shards.schema))
        shards.close()
        (draft / "README.md").write_text(_card(view, shards.num_rows), encoding="utf-8")
        files = files_in(draft)
    return Exported(folder=str(folder), files=files, rows=shards.num_rows, left_out=dict(view.left_out), ledger_digest=view.ledger_digest)


class _Shards:
    """Parquet files that are filled one after the other, and named at the end, when their number is known."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir()
        self.schema, self.num_rows = schema, 0
        self._folder = folder
        self._files: list[Path] = []
        self._open: tuple[BinaryIO, pq.ParquetWriter] | None = None
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table) -> None:
        self.num_rows += table.num_rows
        self._waiting.append(table)
        if sum(waiting.nbytes for waiting in self._waiting) >= ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._end_shard()
        for number, file in enumerate(self._files):
            file.rename(self._folder / f"train-{number:05d}-of-{len(self._files):05d}.parquet")

    def _flush(self) -> None:
        if not self._waiting:
            return
        file, writer = self._open or self._begin_shard()
        writer.write_table(pa.concat_tables(self._waiting))
        self._waiting.clear()
        if file.tell() >= SHARD_BYTES:
            self._end_shard()

    def _begin_shard(self) -> tuple[BinaryIO, pq.ParquetWriter]:
        self._files.append(self._folder / f"shard-{len(self._files)}")
        file = self._files[-1].open("wb")
        self._open = file, pq.ParquetWriter(file, self.schema, compression="zstd", **_encoding(self.schema))
        return self._open

    def _end_shard(self) -> None:
        if self._open is not None:
            file, writer = self._open
            writer.close()
            file.close()
            self._open = None


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """The bytes of floats apart, which makes bf16-exact values half as large."""
    numbers = [f"{field.name}.list.element" for field in schema if pa.types.is_fixed_size_list(field.type)]
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    return {"use_byte_stream_split": numbers, "use_dictionary": texts} if numbers else {"use_dictionary": texts}


def _schema(view: View) -> pa.Schema:
    known = [pa.field(name, kind, nullable=False) for name, kind, _ in _COLUMNS]
    judged = [pa.field("is_default", pa.bool_(), nullable=False), pa.field("score", pa.int8())]
    vector = pa.list_(pa.float32(), view.store.hidden_size)
    return pa.schema([*known, *judged, *(pa.field(_column(layer), vector, nullable=False) for layer in view.layers)])


def _column(layer: int) -> str:
    return f"activations_layer_{layer}"


def _table(view: View, unit: StoredRows, schema: pa.Schema) -> pa.Table:
    columns: dict[str, Any] = {name: [value(rollout) for rollout in unit.rollouts] for name, _, value in _COLUMNS}
    columns["is_default"] = [rollout.key.archetype in view.store.default_archetypes for rollout in unit.rollouts]
    columns["score"] = pa.array(unit.score_R, mask=unit.score_R == NOT_SCORED)
    for place, layer in enumerate(view.layers):
        values = pa.array(np.ascontiguousarray(unit.activations_RLD[:, place]).reshape(-1))
        columns[_column(layer)] = pa.FixedSizeListArray.from_arrays(values, view.store.hidden_size)
    return pa.table(columns, schema=schema)


def _card(view: View, num_rows: int) -> str:
    fields = {
        "pretty_name": f"Rollouts of {view.store.identity['model_id']} in {len(view.store.archetypes)} characters",
        "tags": ["persona-ray", "assistant-axis", "activations", "interpretability"],
        **base_model(view.store),
        "size_categories": [_size(num_rows)],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    facts = {
        "rows": f"{num_rows:,}",
        "left out": ", ".join(f"{count:,}: {reason}" for reason, count in view.left_out.items()) or "none",
        "archetypes": f"{len(view.store.archetypes):,}",
        "layers with activations": shown_layers(view.layers) or "none",
        "hidden size": view.store.hidden_size,
        "judge": view.judge or "none",
        "state of the store": f"`{view.ledger_digest}`",
        **provenance(view.store),
    }
    numbers = (
        "\n`activations_layer_{l}` is the residual stream after decoder block l (from 0, before any final norm),\n"
        "mean over the answer's tokens.\n"
        if view.layers
        else ""
    )
    return f"""{header(fields)}
# Rollouts of {view.store.identity["model_id"]} in character

One row is one answer: `archetype`, `system_prompt_index`, `question_index`, `sample` and `turn` say which, then come the texts,
why the answer ended, its tokens (`num_tokens` of the whole conversation, `response_tokens` that were pooled) and how far it is in
its role (`score`, 0 to 3; null: not scored).
{numbers}
```python
from datasets import load_dataset
rows = load_dataset("path/of/this/folder", split="train")
```
{table(facts)}"""


def _size(num_rows: int) -> str:
    """The hub's word for it."""
    for limit, name in ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M")):
        if num_rows < limit:
            return name
    return "1M<n<10M"
