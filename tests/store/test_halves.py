"""Chunks made by way of the upper halves are Blosc's own, and every Blosc reads them; whatever else is there is left to Blosc."""

from __future__ import annotations

from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.blosc import Blosc

from persona_ray.store import halves

BY_BLOSC = Blosc(halves.CNAME, halves.CLEVEL, Blosc.BITSHUFFLE, typesize=4)


def upper(num_values: int, seed: int) -> np.ndarray:
    """Upper halves of values as they come, a few NaN and infinite."""
    values = np.random.default_rng(seed).normal(scale=30, size=num_values)
    values[::1009] = np.nan
    values[::2003] = np.inf
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def bits(upper_N: np.ndarray) -> np.ndarray:
    return upper_N.astype(np.uint32) << 16


def read(buffer: bytes, num_values: int) -> np.ndarray | None:
    found = np.full(num_values, 7, dtype=np.uint32)
    return found if halves.decompress_into(found, memoryview(buffer)) else None


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40_000), st.integers(0, 9), st.booleans())
def test_blosc_reads_them_and_makes_the_same_where_its_blocks_fit(eighth: int, seed: int, is_even: bool) -> None:
    num_values = 8 * eighth + (0 if is_even else 3)
    values = upper(num_values, seed)
    parts, theirs = halves.compress(values), BY_BLOSC.encode(bits(values))
    if parts is None:
        assert not is_even or num_values < halves.MIN_BLOCK_VALUES or num_values > halves.MAX_BLOCK_VALUES
    else:
        ours = b"".join(parts)
        np.testing.assert_array_equal(np.frombuffer(BY_BLOSC.decode(ours), dtype=np.uint32), bits(values))
        np.testing.assert_array_equal(read(ours, num_values), bits(values))
        assert ours == theirs or num_values > halves.MAX_BLOCK_VALUES
    found = read(theirs, num_values)
    assert found is None or np.array_equal(found, bits(values))


@pytest.mark.parametrize(("rows", "width"), [(50, 2560), (64, 8192), (64, 5120), (64, 4608), (100, 3072), (16, 128)])
def test_shapes_of_real_models_go_this_way(rows: int, width: int) -> None:
    values = upper(rows * width, 1)
    parts = halves.compress(values)
    assert parts is not None
    ours, theirs = b"".join(parts), BY_BLOSC.encode(bits(values))
    assert len(ours) <= 1.005 * len(theirs)
    if rows * width % halves.MAX_BLOCK_VALUES == 0 or rows * width < halves.MAX_BLOCK_VALUES:
        assert ours == theirs
        assert read(theirs, rows * width) is not None
    assert read(ours, rows * width) is not None


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(size=4096).astype(np.float32),
        np.arange(100, dtype=np.float32),
        np.random.default_rng(0).integers(0, 2**32, 4096, np.uint32).view(np.float32),
    ],
    ids=["whole float32", "few", "not compressible"],
)
def test_other_buffers_are_left_to_blosc(values: np.ndarray) -> None:
    assert read(BY_BLOSC.encode(values), len(values)) is None


def test_halves_that_do_not_get_smaller_are_left_to_blosc() -> None:
    noise = np.random.default_rng(0).integers(0, 1 << 16, 1 << 14).astype(np.uint16)
    assert halves.compress(noise) is None


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damage_is_noticed_or_left_to_blosc_or_wrong_values_and_nothing_worse(data: st.DataObject) -> None:
    """Check sums are compared before; whatever gets past them must not read outside of the buffer."""
    encoded = bytearray(BY_BLOSC.encode(bits(upper(2048, 0))))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1) | st.integers(0, 30))] = data.draw(st.integers(0, 255))
    cut = bytes(encoded[: data.draw(st.integers(0, len(encoded)) | st.just(len(encoded)))])
    with suppress(ValueError, RuntimeError):
        read(cut, 2048)
