"""Units are encoded without Zarr's event loop; the bytes are Zarr's own."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from persona_ray.errors import IntegrityError
from persona_ray.store.encoding import array_objects, decode_unit, encode_unit
from persona_ray.store.layout import ArraySpec


def spec_of(shape: tuple[int, ...], dtype: str, fill: float, *, num_units: int = 1) -> ArraySpec:
    is_shard = len(shape) == 3
    return ArraySpec(
        name="a",
        dims=("rollout", "layer", "hidden")[: len(shape)],
        shape=(num_units * shape[0], *shape[1:]),
        dtype=dtype,
        fill=fill,
        chunks=(shape[0], 1, shape[2]) if is_shard else shape,
        shards=shape if is_shard else None,
    )


def by_zarr(shape: tuple[int, ...], dtype: str, fill: float, values: np.ndarray) -> bytes:
    return next(data for key, data in array_objects(spec_of(shape, dtype, fill), values).items() if key.startswith("a/c/"))


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.array_shapes(min_dims=3, max_dims=3, max_side=9).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_nan=True, allow_infinity=True))
    ),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_shards_are_byte_for_byte_those_of_zarr(values: np.ndarray, dtype: str) -> None:
    with np.errstate(all="ignore"):
        values = values.astype(ml_dtypes.bfloat16).astype(np.float32) if dtype == "bfloat16" else values
    data = encode_unit(spec_of(values.shape, dtype, float("nan"), num_units=3), values)
    assert data == by_zarr(values.shape, dtype, float("nan"), values.astype(np.dtype(dtype)))
    found = decode_unit(spec_of(values.shape, dtype, float("nan")), data, "here")
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.float32


@settings(max_examples=60, deadline=None)
@given(
    values=st.sampled_from([np.int8, np.int32, np.int64]).flatmap(lambda dtype: hnp.arrays(dtype, st.integers(1, 3000))),
)
def test_chunks_are_byte_for_byte_those_of_zarr(values: np.ndarray) -> None:
    spec = spec_of(values.shape, values.dtype.name, -1, num_units=2)
    data = encode_unit(spec, values)
    assert data == by_zarr(values.shape, values.dtype.name, -1, values)
    np.testing.assert_array_equal(decode_unit(spec, data, "here"), values)


def test_a_large_shard_is_that_of_zarr() -> None:
    values = np.random.default_rng(0).normal(size=(33, 12, 515)).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert encode_unit(spec_of(values.shape, "float32", float("nan")), values) == by_zarr(values.shape, "float32", float("nan"), values)


def test_an_inner_chunk_that_was_never_written_is_the_fill_value() -> None:
    """Our writer writes all of them; Zarr may leave one out."""
    import zarr
    from zarr.storage import MemoryStore

    from persona_ray.store.encoding import COMPRESSORS

    memory: dict = {}
    spec = spec_of((4, 3, 5), "float32", float("nan"))
    array = zarr.create_array(
        MemoryStore(memory),
        shape=spec.shape,
        chunks=spec.chunks,
        shards=spec.shards,
        dtype="float32",
        fill_value=spec.fill,
        compressors=COMPRESSORS,
    )
    array[:, 1] = 7
    found = decode_unit(spec, memory["c/0/0/0"].to_bytes(), "here")
    assert np.isnan(found[:, [0, 2]]).all()
    assert (found[:, 1] == 7).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_are_an_error_and_never_other_numbers(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from([(4, 3, 5), (7,)]))
    spec = spec_of(shape, "float32" if len(shape) == 3 else "int32", 0)
    encoded = bytearray(encode_unit(spec, np.arange(np.prod(shape)).reshape(shape)))
    if data.draw(st.booleans()):
        encoded = encoded[: data.draw(st.integers(0, len(encoded) - 1))]
    else:
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(IntegrityError, match="here: a "):
        decode_unit(spec, bytes(encoded), "here")
