"""What the published implementation computed, imported without the model, gives its role vectors and its axis."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_ray.store.exchange.published import export_published
from persona_ray.store.exchange.published_import import import_published
from persona_ray.store.reader import StoreReader, open_store
from tests.conformance.conftest import relative
from tests.store.exchange.conftest import reduce_all

pytestmark = pytest.mark.conformance


@pytest.fixture(scope="module")
def imported(golden_folder: Path, golden: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """The published texts and scores, and `activations/*.pt` as step 2 saves them, in float32 as the golden data are."""
    root = tmp_path_factory.mktemp("golden")
    for name in ("responses", "scores"):
        shutil.copytree(golden_folder / name, root / "outputs" / name)
    (root / "outputs/activations").mkdir()
    keys = [key.split("/") for key in golden["keys"].tolist()]
    for role in sorted({role for role, _ in keys}):
        activations = {key: torch.from_numpy(golden["mean_fp32"][i].copy()) for i, (of, key) in enumerate(keys) if of == role}
        torch.save(activations, root / f"outputs/activations/{role}.pt")
    done = import_published(root / "outputs", str(root / "store"), model_id="llama3-tiny", unit_rows=32)
    assert (done.rows, done.left_out, done.scores_without_row) == (288, {}, 0)
    return open_store(str(root / "store"))


def test_role_vectors_and_axis(imported: StoreReader, golden: dict[str, np.ndarray]) -> None:
    reduced = reduce_all(imported, min_count=5)
    kept = [code for code, name in enumerate(reduced.archetypes) if np.isfinite(reduced.role_vector_ALD[code]).all()]
    assert [reduced.archetypes[code] for code in kept] == golden["role_names"].tolist()
    assert relative(reduced.role_vector_ALD[kept], golden["role_vectors_fp32"]).max() <= 1e-5
    assert relative(reduced.default_vector_LD, golden["default_vector_fp32"]).max() <= 1e-5
    assert relative(reduced.axis_LD, golden["axis_fp32"]).max() <= 1e-5


def test_the_published_files_come_back(imported: StoreReader, golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    export_published(imported, tmp_path / "out")
    for i, key in enumerate(golden["keys"].tolist()):
        role, name = key.split("/")
        found = torch.load(tmp_path / f"out/activations/{role}.pt", weights_only=True, mmap=True)[name]
        np.testing.assert_array_equal(found.numpy(), golden["mean_fp32"][i])
