"""Rollouts as Parquet, and back."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError
from persona_ray.spec import FinishReason, Rollout, RowKey
from persona_ray.store.text import ROLLOUT_SCHEMA, decode_rollouts, decode_table, encode_rollouts, encode_table

ROLLOUT = Rollout(
    index=4,
    key=RowKey("bard", 1, 2, 3, 2),
    system_prompt="You are a bard.",
    question="Why?",
    response="Because.",
    token_ids=np.arange(12, dtype=np.int32),
    response_start=8,
    response_end=11,
    finish_reason=FinishReason.STOP,
    thinking="Let me think.",
)
ROLLOUTS = tuple(
    replace(ROLLOUT, index=index, token_ids=np.arange(12 + index, dtype=np.int32), refusal="empty" if index % 3 else None)
    for index in range(5)
)
PART = encode_rollouts(ROLLOUTS)


def as_values(rollouts: tuple[Rollout, ...]) -> list[tuple[object, ...]]:
    names = [name for name in Rollout.__dataclass_fields__ if name != "token_ids"]
    return [(rollout.token_ids.tolist(), *(getattr(rollout, name) for name in names)) for rollout in rollouts]


def flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def test_reasoning_has_a_column_beside_the_answer() -> None:
    data = encode_rollouts([ROLLOUT])
    line = decode_table(data, "here").to_pylist()[0]
    assert (line["response"], line["thinking"]) == ("Because.", "Let me think.")
    back = decode_rollouts(data, "here")[0]
    assert np.array_equal(back.token_ids, ROLLOUT.token_ids)
    fields = [field for field in Rollout.__dataclass_fields__ if field != "token_ids"]
    assert [getattr(back, field) for field in fields] == [getattr(ROLLOUT, field) for field in fields]


def test_a_part_from_before_that_column_has_no_reasoning() -> None:
    older = decode_table(encode_rollouts([ROLLOUT]), "here").drop_columns(["thinking"])
    assert decode_rollouts(encode_table(older), "here")[0].thinking == ""


@pytest.mark.parametrize("column", [name for name in ROLLOUT_SCHEMA.names if name != "thinking"])
def test_any_other_column_must_be_there(column: str) -> None:
    damaged = decode_table(encode_rollouts([ROLLOUT]), "here").drop_columns([column])
    with pytest.raises(IntegrityError, match="here: not a file of rollouts"):
        decode_rollouts(encode_table(damaged), "here")


@given(place=st.integers(0, len(PART) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_an_error_or_harmless(place: int, bit: int) -> None:
    """Harmless: in statistics, offsets and the like, of which rows are no function."""
    with suppress(IntegrityError):
        assert as_values(decode_rollouts(flipped(PART, place, bit), "here")) == as_values(ROLLOUTS)


@given(data=st.data())
def test_a_flipped_bit_in_a_page_is_an_error_in_any_reader(data: st.DataObject) -> None:
    """Of the answers, say: their page is stored as it is, so that without a checksum the flip would be another text."""
    chunk = pq.ParquetFile(BytesIO(PART)).metadata.row_group(0).column(ROLLOUT_SCHEMA.get_field_index("response"))
    text = PART.index(b"Because.", chunk.dictionary_page_offset)
    place = text + data.draw(st.integers(0, len(b"Because.") - 1))
    broken = flipped(PART, place, data.draw(st.integers(0, 6)))
    with pytest.raises(IntegrityError, match="CRC"):
        decode_table(broken, "here")
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(BytesIO(broken), page_checksum_verification=True)
    assert pq.read_table(BytesIO(broken), columns=["response"]).num_rows == len(ROLLOUTS)


def test_a_shortened_list_of_tokens_is_found() -> None:
    """Its count stands in a page's header, of which there is no checksum."""
    table = decode_table(PART, "here")
    ids = table.column("token_ids").to_pylist()
    field = ROLLOUT_SCHEMA.field("token_ids")
    shorter = table.set_column(table.schema.get_field_index(field.name), field, pa.array([*ids[:-1], ids[-1][:-4]], field.type))
    with pytest.raises(IntegrityError, match="here: holds 66 token ids, and was written with 70"):
        decode_rollouts(encode_table(shorter), "here")


def test_a_part_from_before_checksums_is_read() -> None:
    sink = BytesIO()
    pq.write_table(decode_table(PART, "here").replace_schema_metadata(None), sink, compression="zstd")
    assert as_values(decode_rollouts(sink.getvalue(), "here")) == as_values(ROLLOUTS)


@pytest.mark.parametrize("column", ROLLOUT_SCHEMA.names)
def test_a_column_of_another_type_is_an_error(column: str) -> None:
    table = decode_table(PART, "here")
    place = table.schema.get_field_index(column)
    strange = table.set_column(place, column, [[b"x"] * len(ROLLOUTS)])
    with pytest.raises(IntegrityError, match=f"here: not a file of rollouts.*{column} binary"):
        decode_rollouts(encode_table(strange), "here")


def test_a_process_that_ends_after_reading_ends_well() -> None:
    """Repeated, because it is a race: of threads that outlive the read with the end of the process."""
    code = "import sys; from persona_ray.store.text import decode_table; decode_table(sys.stdin.buffer.read(), 'here')"
    for _ in range(6):
        subprocess.run([sys.executable, "-c", code], input=PART, check=True)
