"""A unit's text as Parquet: `rollouts/part-{unit}.parquet`, one line per row. Columns as in the design, plus `refusal`.

The same rollouts give the same bytes (for one version of pyarrow). Knows nothing of units or backends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from persona_ray.errors import IntegrityError
from persona_ray.spec import FinishReason, Int32, Rollout, RowKey

ROLLOUT_COLUMNS: tuple[tuple[str, pa.DataType, Callable[[Rollout], Any]], ...] = (
    ("rollout", pa.int64(), lambda rollout: rollout.index),
    ("archetype", pa.string(), lambda rollout: rollout.key.archetype),
    ("system_prompt_index", pa.int32(), lambda rollout: rollout.key.system_prompt),
    ("question_index", pa.int32(), lambda rollout: rollout.key.question),
    ("sample", pa.int32(), lambda rollout: rollout.key.sample),
    ("turn", pa.int32(), lambda rollout: rollout.key.turn),
    ("system_prompt", pa.string(), lambda rollout: rollout.system_prompt),
    ("question", pa.string(), lambda rollout: rollout.question),
    ("response", pa.string(), lambda rollout: rollout.response),
    ("thinking", pa.string(), lambda rollout: rollout.thinking),
    ("token_ids", pa.list_(pa.int32()), lambda rollout: np.asarray(rollout.token_ids, dtype=np.int32)),
    ("response_start", pa.int32(), lambda rollout: rollout.response_start),
    ("response_end", pa.int32(), lambda rollout: rollout.response_end),
    ("finish_reason", pa.string(), lambda rollout: rollout.finish_reason.name.lower()),
    ("refusal", pa.string(), lambda rollout: rollout.refusal),
)
"""Name, type, and value of a row."""
NUM_TOKENS = b"num_token_ids"
"""In the file's own metadata: a damaged count of list elements would shorten the last list without another sign."""
ROLLOUT_SCHEMA = pa.schema([pa.field(name, kind, nullable=name == "refusal") for name, kind, _ in ROLLOUT_COLUMNS])


def encode_rollouts(rollouts: Sequence[Rollout]) -> bytes:
    """Parquet bytes, zstd."""
    columns = {name: [value(rollout) for rollout in rollouts] for name, _, value in ROLLOUT_COLUMNS}
    num_tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return encode_table(pa.table(columns, schema=ROLLOUT_SCHEMA.with_metadata({NUM_TOKENS: str(num_tokens)})))


def decode_rollouts(data: bytes, where: str) -> tuple[Rollout, ...]:
    """The reverse. Raises IntegrityError naming `where` if the bytes are damaged."""
    table = decode_table(data, where)
    _check_schema(table.schema, where)
    try:
        token_ids = _lists(table.column("token_ids"))
        _check_num_tokens(table.schema.metadata or {}, sum(map(len, token_ids)), where)
        lines = table.drop_columns(["token_ids"]).to_pylist()
        return tuple(_rollout(line, ids) for line, ids in zip(lines, token_ids, strict=True))
    except KeyError as error:  # a reason to finish that there is not
        raise IntegrityError(f"{where}: not a file of rollouts ({error})") from error


def encode_table(table: pa.Table) -> bytes:
    """Parquet bytes, zstd, with a checksum of each page."""
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def decode_table(data: bytes, where: str) -> pa.Table:
    """The reverse, also of files without checksums. Raises IntegrityError naming `where` if the bytes are damaged.

    Pages have checksums, their headers and the file's footer have not: what counts of those, the caller checks.
    """
    try:
        # One thread: those of a pool can outlive the read, and a process that ends meanwhile aborts.
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read(use_threads=False)
        table.validate(full=True)  # a damaged footer can turn bytes into text
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{where}: not a readable Parquet file ({error})") from error
    return table


def _check_schema(schema: pa.Schema, where: str) -> None:
    """The columns of rollouts, in order; the first stores have no `thinking`."""
    older = ROLLOUT_SCHEMA.remove(ROLLOUT_SCHEMA.get_field_index("thinking"))
    if not (schema.equals(ROLLOUT_SCHEMA) or schema.equals(older)):
        names = [f"{field.name} {field.type}" for field in schema if field not in list(ROLLOUT_SCHEMA)]
        missing = [name for name in older.names if name not in schema.names]
        raise IntegrityError(f"{where}: not a file of rollouts (strange columns: {names}, missing: {missing})")


def _check_num_tokens(metadata: Mapping[bytes, bytes], num_tokens: int, where: str) -> None:
    """The first stores did not record it."""
    recorded = metadata.get(NUM_TOKENS)
    if recorded is not None and recorded != str(num_tokens).encode():
        raise IntegrityError(f"{where}: holds {num_tokens} token ids, and was written with {recorded.decode(errors='replace')}")


def _lists(column: pa.ChunkedArray) -> list[Int32]:
    return [np.asarray(ids.values.to_numpy(zero_copy_only=False), dtype=np.int32) for chunk in column.chunks for ids in chunk]


def _rollout(line: dict[str, Any], token_ids: Int32) -> Rollout:
    return Rollout(
        index=line["rollout"],
        key=RowKey(line["archetype"], line["system_prompt_index"], line["question_index"], line["sample"], line["turn"]),
        system_prompt=line["system_prompt"],
        question=line["question"],
        response=line["response"],
        token_ids=token_ids,
        response_start=line["response_start"],
        response_end=line["response_end"],
        finish_reason=FinishReason[line["finish_reason"].upper()],
        refusal=line["refusal"],
        thinking=line.get("thinking", ""),  # the first stores have no such column, and no reasoning
    )
