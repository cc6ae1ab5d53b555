"""The result as safetensors, read by safetensors alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from persona_ray.errors import InputError
from persona_ray.store.exchange.tensors import export_safetensors
from persona_ray.store.reader import StoreReader

from .conftest import ROWS, UNIT_ROWS, without_us

READ = """
from pathlib import Path
from safetensors import safe_open
answer = {}
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        answer[path.name] = {
            "tensors": {name: values.tolist() for name, values in tensors.items()},
            "dtypes": sorted({str(values.dtype) for values in tensors.values()}),
            "metadata": file.metadata(),
        }
"""


def test_safetensors_alone_reads_everything(store: StoreReader, tmp_path: Path) -> None:
    done = export_safetensors(store, tmp_path / "out")
    assert done.files == ("README.md", "axis.safetensors", "pca.safetensors", "role_vectors.safetensors")
    assert done.rows == ROWS - UNIT_ROWS - 3
    found = without_us(READ, tmp_path / "out")
    reduced = store.reduced(str(store.latest_reduced()))
    roles = {name: code for code, name in enumerate(reduced.archetypes) if np.isfinite(reduced.role_vector_ALD[code]).all()}
    assert len(roles) == 3
    expected: dict[str, dict[str, np.ndarray]] = {
        "axis.safetensors": {"axis": reduced.axis_LD, "default_vector": reduced.default_vector_LD, "cos_pc1_axis": reduced.cos_pc1_axis_L},
        "role_vectors.safetensors": {name: reduced.role_vector_ALD[code] for name, code in roles.items()},
        "pca.safetensors": {
            "explained_variance_ratio": reduced.pca_explained_variance_ratio_LK,
            **{f"pc_{k + 1}": reduced.pca_components_LKD[:, k] for k in range(reduced.pca_components_LKD.shape[1])},
        },
    }
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        assert found[file]["dtypes"] == ["float32"]
        assert found[file]["tensors"].keys() == tensors.keys()
        for name, values in tensors.items():
            np.testing.assert_array_equal(np.array(found[file]["tensors"][name], np.float32), values)
        metadata = found[file]["metadata"]
        assert json.loads(metadata["layers"]) == [0, 3]
        assert (metadata["model_id"], metadata["ledger_digest"]) == ("toy/model", reduced.attributes["ledger_digest"])
        assert "hook_resid_post" in metadata["alias_transformerlens"]
        assert "minus" in metadata["sign"].replace("-", "minus")


def test_some_layers(store: StoreReader, tmp_path: Path) -> None:
    export_safetensors(store, tmp_path / "out", layers=[3])
    found = without_us(READ, tmp_path / "out")["axis.safetensors"]
    np.testing.assert_array_equal(np.array(found["tensors"]["axis"], np.float32), store.reduced(str(store.latest_reduced())).axis_LD[1:])
    assert found["metadata"]["layers"] == "[3]"


def test_the_card(store: StoreReader, tmp_path: Path) -> None:
    export_safetensors(store, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    _, header, text = card.split("---\n", 2)
    fields: dict[str, Any] = yaml.safe_load(header)
    assert fields["base_model"] == "toy/model"
    assert "assistant-axis" in fields["tags"]
    assert "license" not in fields
    assert "# license" in header
    reduced = store.reduced(str(store.latest_reduced()))
    assert f"{reduced.cos_pc1_axis_L[reduced.layers.index(reduced.attributes['best_layer'])]:.4f}" in text
    assert reduced.attributes["ledger_digest"] in text
    assert str(tmp_path.parent) not in card, "a local path is nobody's business"


def test_how_the_card_says_to_load(store: StoreReader, tmp_path: Path) -> None:
    export_safetensors(store, tmp_path / "out")
    code = (tmp_path / "out/README.md").read_text().split("```python\n")[1].split("```")[0]
    axis = without_us(f"import os\nos.chdir(sys.argv[1])\n{code}answer = axis.tolist()", tmp_path / "out")
    reduced = store.reduced(str(store.latest_reduced()))
    np.testing.assert_array_equal(np.array(axis, np.float32), reduced.axis_LD[reduced.layers.index(reduced.attributes["best_layer"])])


def test_what_cannot_be_exported(store: StoreReader, empty_store: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is reduced"):
        export_safetensors(empty_store, tmp_path / "out")
    with pytest.raises(InputError, match="no layer 7"):
        export_safetensors(store, tmp_path / "out", layers=[7])
    assert list(tmp_path.iterdir()) == []
