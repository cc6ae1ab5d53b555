"""Layers of a unit, whichever way they are read, are bit for bit what Zarr reads; damage is an error that names the object."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError
from persona_ray.store import arrays
from persona_ray.store.arrays import UnitNumbers
from persona_ray.store.blocks import decode_index
from persona_ray.store.encoding import array_objects, encode_unit, zarr_arguments
from persona_ray.store.folder import FolderBackend
from persona_ray.store.layout import ArraySpec, chunk_key

NUM_UNITS = 2


def spec_of(shape: tuple[int, int, int], dtype: str = "float32") -> ArraySpec:
    unit_rows, num_layers, width = shape
    return ArraySpec(
        name="a",
        dims=("rollout", "layer", "hidden"),
        shape=(NUM_UNITS * unit_rows, num_layers, width),
        dtype=dtype,
        fill=float("nan"),
        chunks=(unit_rows, 1, width),
        shards=shape,
    )


class Asked(FolderBackend):
    """A folder that counts."""

    def __init__(self, root: str | Path) -> None:
        super().__init__(Path(root))
        self.wholes, self.ends, self.parts = 0, 0, 0

    def get_or_none(self, key: str) -> bytes | None:
        self.wholes += 1
        return super().get_or_none(key)

    def part_or_none(self, key: str, start: int, stop: int | None = None) -> bytes | None:
        self.ends, self.parts = self.ends + (stop is None), self.parts + (stop is not None)
        return super().part_or_none(key, start, stop)


def put(folder: str | Path, spec: ArraySpec, unit: int, data: bytes) -> None:
    path = Path(folder) / chunk_key(spec, unit)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def read(numbers: UnitNumbers, spec: ArraySpec, unit: int, layers: list[int], rows: list[int]) -> Any:
    out_RLD = np.empty((len(rows), len(layers), spec.shape[2]), dtype=np.float32)
    numbers.read(spec, unit, list(enumerate(layers)), np.array(rows, dtype=np.int64), out_RLD)
    return out_RLD


def num_runs(layers: list[int]) -> int:
    """Of neighbours."""
    return sum(layer - 1 not in layers for layer in set(layers))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), by_zarr=st.booleans(), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_layers_of_any_rows_are_those_that_zarr_reads(data: st.DataObject, by_zarr: bool, dtype: str) -> None:
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 40)), "shape")
    layers = data.draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, max_size=10), "layers")
    rows = data.draw(st.lists(st.integers(0, shape[0] - 1)) | st.permutations(range(shape[0])) | st.just(list(range(shape[0]))), "rows")
    spec = spec_of(shape, dtype)
    bits = np.random.default_rng(data.draw(st.integers(0, 99), "seed")).integers(0, 2**32, (NUM_UNITS * shape[0], *shape[1:]), np.uint32)
    with np.errstate(all="ignore"):
        values = bits.view(np.float32).astype(ml_dtypes.bfloat16).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        place = Asked(folder)
        written = array_objects(spec, values) if by_zarr else array_objects(spec)
        for key, document in written.items():
            (place.root / key).parent.mkdir(parents=True, exist_ok=True)
            (place.root / key).write_bytes(document)
        for unit in range(0 if by_zarr else NUM_UNITS):
            put(place.root, spec, unit, encode_unit(spec, values[unit * shape[0] :][: shape[0]]))
        array = zarr.open_array(place.zarr_store(), path="a", mode="r")
        numbers = UnitNumbers(place)
        for num_before in range(2):
            for unit in range(NUM_UNITS):
                expected = np.asarray(array.oindex[np.array(rows, dtype=np.int64) + unit * shape[0], layers]).astype(np.float32)
                found = read(numbers, spec, unit, layers, rows)
                np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
            asked = (place.wholes, place.ends, place.parts)
            if 2 * len(set(layers)) > shape[1]:
                assert asked == ((num_before + 1) * NUM_UNITS, 0, 0)
            elif not by_zarr:  # whose inner chunks lie in an order of their own
                assert asked == (0, NUM_UNITS, (num_before + 1) * NUM_UNITS * num_runs(layers))


def test_an_inner_chunk_that_was_never_written_is_the_fill_value(tmp_path: Path) -> None:
    """Our writer writes all of them; Zarr may leave one out."""
    spec = spec_of((4, 5, 3))
    array = zarr.create_array(str(tmp_path), name="a", **zarr_arguments(spec))
    array[4:, 1] = 7
    numbers = UnitNumbers(FolderBackend(tmp_path))
    assert (read(numbers, spec, 1, [1], [0, 1, 2, 3]) == 7).all()
    assert np.isnan(read(numbers, spec, 1, [0, 2], [0, 1, 2, 3])).all()
    found = read(numbers, spec, 1, [4, 1, 0, 2], [1, 3])
    assert (found[:, 1] == 7).all()
    assert np.isnan(found[:, [0, 2, 3]]).all()


@settings(max_examples=150, deadline=None)
@given(data=st.data(), layers=st.lists(st.integers(0, 5), min_size=1, max_size=5), is_indexed=st.booleans())
def test_damage_of_what_is_asked_for_is_an_error_and_never_other_numbers(data: st.DataObject, layers: list[int], is_indexed: bool) -> None:
    """And damage elsewhere changes nothing; that of the index harms whoever has not read it yet."""
    spec = spec_of((4, 6, 5))
    values = np.random.default_rng(0).normal(size=(4, 6, 5)).astype(np.float32)
    encoded = encode_unit(spec, values)
    index_L2 = decode_index(encoded, 6)
    place = data.draw(st.integers(0, len(encoded) - 1), "place")
    is_cut = data.draw(st.booleans(), "cut there")
    flipped = encoded[:place] + bytes([encoded[place] ^ 1 << data.draw(st.integers(0, 7))]) + encoded[place + 1 :]
    harmed = {i for i, (offset, size) in enumerate(index_L2.tolist()) if place < offset + size and (is_cut or place >= offset)}
    needs_index = not is_indexed or len(set(layers)) > 3
    with tempfile.TemporaryDirectory() as folder:
        numbers = UnitNumbers(FolderBackend(Path(folder)))
        put(folder, spec, 0, encoded)
        if is_indexed:
            read(numbers, spec, 0, [0], [0])
        put(folder, spec, 0, encoded[:place] if is_cut else flipped)
        if harmed & set(layers) or (needs_index and (is_cut or not harmed)):
            with pytest.raises(IntegrityError, match=f"^{folder}: a/c/0/0/0: a (cannot be decoded|is an empty object)"):
                read(numbers, spec, 0, layers, [0, 2])
        else:
            np.testing.assert_array_equal(read(numbers, spec, 0, layers, [0, 2]), values[[0, 2]][:, layers])


def test_a_missing_object_is_named(tmp_path: Path) -> None:
    numbers, spec = UnitNumbers(FolderBackend(tmp_path)), spec_of((4, 6, 5))
    for layers in ([2], [0, 1, 2, 3, 4]):
        with pytest.raises(IntegrityError, match=r"object a/c/1/0/0 is missing"):
            read(numbers, spec, 1, layers, [0])


def test_as_many_indices_are_kept_as_was_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "MAX_INDICES", 1)
    spec, place = spec_of((2, 4, 3)), Asked(tmp_path)
    values = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    for unit in range(NUM_UNITS):
        put(place.root, spec, unit, encode_unit(spec, values + unit))
    numbers = UnitNumbers(place)
    for unit, ends in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3), (1, 4)):
        np.testing.assert_array_equal(read(numbers, spec, unit, [3], [1]), (values + unit)[1:, 3:])
        assert place.ends == ends
