"""The store is for teams that do not have this package: plain zarr, xarray and TensorStore open it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

READ_WITH = {
    "zarr": """
        import zarr
        group = zarr.open_group(path, mode="r")
        arrays = {name: array[...] for name, array in group.arrays()}
        dims = {name: array.metadata.dimension_names for name, array in group.arrays()}
    """,
    "xarray": """
        import warnings
        warnings.simplefilter("error")
        import xarray
        dataset = xarray.open_zarr(path, chunks=None)
        arrays = {name: dataset[name].values for name in dataset.variables}
        dims = {name: dataset[name].dims for name in dataset.variables}
        assert float(dataset["activations"].isel(rollout=0).sel(layer=3).mean()) == float(arrays["activations"][0, 1].mean())
        assert set(dataset.coords) == {"rollout", "layer"}
    """,
    "tensorstore": """
        import pathlib
        import tensorstore
        names = [folder.parent.name for folder in pathlib.Path(path).glob("*/zarr.json")]
        spec = lambda name: {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{name}/"}}
        opened = {name: tensorstore.open(spec(name), read=True).result() for name in names}
        arrays = {name: array.read().result() for name, array in opened.items()}
        dims = {name: array.domain.labels for name, array in opened.items()}
    """,
}

SAVE = """
import sys
sys.modules["persona_ray"] = None  # an import of it would fail
path, target = sys.argv[1:]
{read}
import numpy
values = {{f"values/{{name}}": array for name, array in arrays.items()}}
labels = {{f"dims/{{name}}": numpy.array(dims[name]) for name in dims}}
numpy.savez(target, **values, **labels)
"""


@pytest.mark.parametrize("library", READ_WITH)
def test_other_libraries_read_a_growing_store(tmp_path: Path, toy: Any, library: str) -> None:
    toy.fill(tmp_path / "store", units=range(0, 3, 2), refused={1: "empty answer"})
    script = SAVE.format(read=textwrap.dedent(READ_WITH[library]))
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "store"), str(tmp_path / "seen.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    seen = np.load(tmp_path / "seen.npz")
    dims = {name.partition("/")[2]: tuple(seen[name]) for name in seen if name.startswith("dims/")}
    columns = (
        "rollout",
        "archetype",
        "system_prompt",
        "question",
        "sample",
        "turn",
        "response_tokens",
        "finish_reason",
        "status",
        "committed",
    )
    assert dims == {
        "activations": ("rollout", "layer", "hidden"),
        "layer": ("layer",),
        **dict.fromkeys(columns, ("rollout",)),
    }
    expected = np.full((12, 2, 6), np.nan, dtype=np.float32)
    expected[0:4] = toy.activations(0).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected[8:10] = toy.activations(2).astype(ml_dtypes.bfloat16).astype(np.float32)
    expected[1] = np.nan
    np.testing.assert_array_equal(seen["values/activations"], expected)
    assert seen["values/activations"].dtype == np.float32
    assert seen["values/layer"].tolist() == [0, 3]
    assert seen["values/status"].tolist() == [0, 1, 0, 0, -1, -1, -1, -1, 0, 0, -1, -1]
    assert seen["values/committed"].tolist() == [1] * 4 + [0] * 4 + [1] * 2 + [0] * 2
    assert seen["values/archetype"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, -1, -1]
    assert seen["values/archetype"].dtype == np.int32
