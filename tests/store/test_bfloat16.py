"""A store in native bfloat16: the same numbers, whoever reads them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.store.bfloat16 import LARGEST_ROUNDED, BFloat16, widened
from persona_ray.store.encoding import decode_unit, encode_unit
from persona_ray.store.layout import ArraySpec
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter

LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
SMALLEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).smallest_subnormal)
AWKWARD = np.array([-0.0, 0.0, SMALLEST, -SMALLEST, 127 * SMALLEST, LARGEST, -LARGEST, 3296.0], dtype=np.float32)


@pytest.fixture
def native(make_toy: Any) -> Any:
    """Ten rows of as many numbers as there are awkward ones."""
    return make_toy(store_dtype="bfloat16", hidden=len(AWKWARD))


def rounded(values: Any) -> Any:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def bits(values: Any) -> Any:
    return np.ascontiguousarray(values).view(np.uint32)


def unit_spec(width: int) -> ArraySpec:
    chunks = (256, 1, width)
    return ArraySpec(name="a", dims=("x", "y", "z"), shape=chunks, dtype="bfloat16", fill=float("nan"), chunks=chunks, shards=chunks)


def test_every_bit_pattern_comes_back() -> None:
    """Infinities, NaN with any payload, both zeros, subnormals: all 65,536."""
    patterns = np.arange(1 << 16, dtype=np.uint16).reshape(256, 1, 256)
    spec = unit_spec(256)
    found = decode_unit(spec, encode_unit(spec, patterns.view(ml_dtypes.bfloat16)), "")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(bits(found), patterns.astype(np.uint32) << 16)


def test_widening_leaves_everything_else_alone() -> None:
    values = np.arange(3, dtype=np.int8)
    assert widened(values) is values


def test_our_reader_answers_the_bits_as_float32(tmp_path: Path, native: Any) -> None:
    native.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    for unit in native.plan.units:
        values_RLD = native.activations(unit)
        values_RLD[0] = AWKWARD
        writer.write_rollouts(unit, native.rollouts(unit))
        writer.commit(native.captured(unit, activations=values_RLD, refused={5: "no luck"} if unit == 1 else {}))
    store = open_store(str(tmp_path))
    whole_NLD = np.concatenate([part.activations_RLD for part in store.scored_rows(native.plan.units, None)])
    expected_NLD = np.concatenate([rounded(native.activations(unit)) for unit in native.plan.units])
    expected_NLD[[0, 4, 8]] = AWKWARD
    expected_NLD = np.delete(expected_NLD, 5, axis=0)
    assert whole_NLD.dtype == np.float32
    np.testing.assert_array_equal(bits(whole_NLD), bits(expected_NLD))
    rows_N, layer_ND = store.layer(3)
    assert rows_N.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert layer_ND.dtype == np.float32
    np.testing.assert_array_equal(bits(layer_ND), bits(expected_NLD[:, 1]))
    dataset = store.rows().to_xarray([3, 0])
    assert dataset["activations"].dtype == np.float32
    np.testing.assert_array_equal(bits(dataset["activations"].sel(layer=0).values), bits(expected_NLD[:, 0]))
    assert store.rows().to_torch().numpy().tobytes() == expected_NLD.tobytes()


def test_what_is_stored_is_what_a_float32_container_holds(tmp_path: Path, make_toy: Any) -> None:
    parts = {}
    for dtype in ("bfloat16", "bf16-exact"):
        toy = make_toy(store_dtype=dtype, hidden=64)
        store = open_store(toy.fill(tmp_path / dtype, refused={1: "empty answer"}))
        assert store.info()["dtype"]["store"] == dtype
        parts[dtype] = store.rows().activations()
        assert store.counts().reasons == {"empty answer": 1}
    np.testing.assert_array_equal(bits(parts["bfloat16"]), bits(parts["bf16-exact"]))


def test_a_number_that_rounds_to_infinity_is_refused(tmp_path: Path, native: Any) -> None:
    native.prepare(tmp_path)
    writer = UnitWriter(str(tmp_path))
    values_RLD = native.activations(0)
    values_RLD[2, 1, 3] = np.finfo(np.float32).max
    writer.write_rollouts(0, native.rollouts(0))
    with pytest.raises(IntegrityError, match=r"NaN or Inf in rows \[2\]"):
        writer.commit(native.captured(0, activations=values_RLD))
    assert not (tmp_path / "activations/c").exists()


def test_what_is_not_written_is_nan(tmp_path: Path, native: Any) -> None:
    native.fill(tmp_path, units=range(1), refused={2: "too long"})
    array = zarr.open_array(tmp_path, path="activations", mode="r")
    assert array.dtype == ml_dtypes.bfloat16
    assert np.isnan(array.fill_value)
    assert np.isnan(array[...].astype("f4")).all(axis=(1, 2)).tolist() == [False, False, True, False] + [True] * 8


def test_verify_reads_it_and_finds_damage(tmp_path: Path, native: Any) -> None:
    url = native.fill(tmp_path, refused={1: "empty answer"})
    assert verify(url).is_right
    shard = tmp_path / "activations/c/1/0/0"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    assert verify(url).wrong_units == (1,)
    with pytest.raises(IntegrityError, match="activations/c/1/0/0"):
        list(open_store(url).scored_rows([1], None))


def test_it_continues_no_other_store(tmp_path: Path, native: Any, make_toy: Any) -> None:
    other = make_toy(hidden=native.hidden)
    url = other.prepare(tmp_path)
    with pytest.raises(InputError, match="store_dtype is 'bf16-exact' in the store, 'bfloat16' in the job"):
        prepare_store(url, identity=native.identity(), plan=native.plan, job={})


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 9), unit_rows=st.integers(1, 5), hidden=st.integers(1, 9), refused=st.sets(st.integers(0, 8)))
def test_any_size_comes_back(make_toy: Any, rows: int, unit_rows: int, hidden: int, refused: set[int]) -> None:
    toy = make_toy(rows=rows, unit_rows=unit_rows, hidden=hidden, store_dtype="bfloat16")
    stored = [row for row in range(rows) if row not in refused]
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(toy.fill(folder, refused={row: "no luck" for row in refused if row < rows}))
        whole_NLD = rounded(np.concatenate([toy.activations(unit) for unit in toy.plan.units])[stored])
        np.testing.assert_array_equal(store.rows().activations(), whole_NLD)
        np.testing.assert_array_equal(store.layer(3)[1], whole_NLD[:, 1])


# ---- other libraries


READ_WITH = {
    "zarr": """
        import persona_ray.store.bfloat16
        import zarr
        array = zarr.open_group(path, mode="r")["activations"]
        values = array[...]
    """,
    "xarray": """
        import persona_ray.store.bfloat16
        import xarray
        array = xarray.open_zarr(path, chunks=None)["activations"]
        assert float(array.isel(rollout=0).sel(layer=3).astype("f4").mean()) == float(array.values[0, 1].astype("f4").mean())
        values = array.values
    """,
    "tensorstore": """
        sys.modules["persona_ray"] = None  # an import of it would fail
        import tensorstore
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/activations/"}}
        values = tensorstore.open(spec, read=True).result().read().result()
    """,
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"import sys\npath = sys.argv[1]\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("library", READ_WITH)
def test_other_libraries_read_it(tmp_path: Path, native: Any, library: str) -> None:
    native.fill(tmp_path / "store", units=range(0, 3, 2), refused={1: "empty answer"})
    save = 'assert str(values.dtype) == "bfloat16"\nimport numpy\nnumpy.save(sys.argv[2], values.view("u2"))'
    done = run(textwrap.dedent(READ_WITH[library]) + save, str(tmp_path / "store"), str(tmp_path / "seen.npy"))
    assert done.returncode == 0, done.stderr
    expected = np.full((12, 2, native.hidden), np.nan, dtype=ml_dtypes.bfloat16)
    expected[0:4], expected[8:10] = native.activations(0), native.activations(2)
    expected[1] = np.nan
    np.testing.assert_array_equal(np.load(tmp_path / "seen.npy"), expected.view("u2"))


def test_stock_zarr_says_that_it_does_not_know_the_type(tmp_path: Path, native: Any) -> None:
    """What the option costs, as its description says. Once zarr reads it, the description is out of date."""
    done = run("import zarr\nzarr.open_array(path, path='activations', mode='r')", native.fill(tmp_path, units=range(1)))
    assert done.returncode == 1
    assert "bfloat16" in done.stderr.splitlines()[-1]


def test_teaching_zarr_loads_nothing_else() -> None:
    heavy = ("torch", "ray", "transformers", "pyarrow", "obstore", "pydantic")
    done = run(f"import persona_ray.store.bfloat16\nprint([name for name in {heavy!r} if name in sys.modules])", "")
    assert done.stdout.strip() == "[]", done.stderr


def test_the_other_byte_order_is_refused_and_not_misread() -> None:
    other = "big" if sys.byteorder == "little" else "little"
    with pytest.raises(ValueError, match=f"{other}-endian bfloat16 cannot be read"):
        BFloat16(endianness=other).to_native_dtype()


@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.sampled_from([LARGEST, float(np.nextafter(LARGEST_ROUNDED, np.float32("inf")))])
)
def test_the_largest_number_that_stays_finite(value: float) -> None:
    with np.errstate(over="ignore"):
        is_finite = bool(np.isfinite(rounded(np.float32(value))))
    assert is_finite == (abs(np.float32(value)) <= LARGEST_ROUNDED)
