"""Ours against what the published implementation computes, in float32, on the golden data that PERSONA_RAY_CONFORMANCE names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from persona_ray.config import parse_job
from persona_ray.spec import Reduced, Rollout
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.terminal import TerminalProgress
from tests.conformance.conftest import relative

pytestmark = pytest.mark.conformance

NUM_ROLLOUTS = 288


@pytest.fixture(scope="module")
def finished(golden_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoreReader:
    """The published conversations through the whole path: two stage actors, Zarr, scores, reduction."""
    from persona_ray import pipeline

    url = str(tmp_path_factory.mktemp("conformance") / "store")
    job = parse_job(
        {
            "name": "conformance",
            "model": {"id": str(golden_folder / "model"), "dtype": "float32"},
            "shards": {"stages": 2, "gpus_per_shard": 0},
            "rollouts": {"source": "import", "path": str(golden_folder / "responses")},
            "store": {"url": url, "dtype": "float32", "unit_rows": 32},
            "judge": {"backend": "scores", "path": str(golden_folder / "scores")},
            "reduce": {"min_count": 5, "somewhat": False},
        }
    )
    outcome = pipeline.run(job, TerminalProgress(Console(quiet=True)))
    assert outcome.counts.stored == NUM_ROLLOUTS
    return open_store(url)


@pytest.fixture(scope="module")
def rollouts(finished: StoreReader) -> dict[str, Rollout]:
    """By the golden data's key."""
    units = sorted(finished.ledger.committed())
    return {f"{r.key.archetype}/pos_p{r.key.system_prompt}_q{r.key.question}": r for part in finished.rollouts(units) for r in part}


@pytest.fixture(scope="module")
def reduced(finished: StoreReader) -> Reduced:
    name = finished.latest_reduced()
    assert name is not None
    return finished.reduced(name)


def test_token_ids_and_spans_are_equal(golden: dict[str, np.ndarray], rollouts: dict[str, Rollout]) -> None:
    assert sorted(golden["keys"].tolist()) == sorted(rollouts)
    for number, key in enumerate(golden["keys"].tolist()):
        rollout, (start, end) = rollouts[key], golden["assistant_span"][number]
        theirs = golden["input_ids"][golden["offsets"][number] : golden["offsets"][number + 1]]
        assert (rollout.response_start, rollout.response_end) == (start, end), key
        assert rollout.token_ids.tolist() == theirs[:end].tolist(), key


def test_every_mean_activation(golden: dict[str, np.ndarray], finished: StoreReader, rollouts: dict[str, Rollout]) -> None:
    place = [rollouts[key].index for key in golden["keys"].tolist()]
    for layer in range(golden["mean_fp32"].shape[1]):
        rows, values_ND = finished.layer(layer)
        assert rows.tolist() == list(range(NUM_ROLLOUTS))
        expected_ND = golden["mean_fp32"][:, layer]
        assert relative(values_ND[place], expected_ND).max() <= 5e-6
        assert np.abs(values_ND[place] - expected_ND).max() <= 2e-5


def test_role_vectors_and_axis(golden: dict[str, np.ndarray], reduced: Reduced) -> None:
    kept = [code for code, name in enumerate(reduced.archetypes) if np.isfinite(reduced.role_vector_ALD[code]).all()]
    assert [reduced.archetypes[code] for code in kept] == golden["role_names"].tolist()
    assert relative(reduced.role_vector_ALD[kept], golden["role_vectors_fp32"]).max() <= 1e-5
    assert relative(reduced.default_vector_LD, golden["default_vector_fp32"]).max() <= 1e-5
    assert relative(reduced.axis_LD, golden["axis_fp32"]).max() <= 1e-5


def test_principal_components(golden: dict[str, np.ndarray], reduced: Reduced) -> None:
    num_roles = len(golden["role_names"])
    ratio_LK = golden["pca_ratio_fp32"][:, : num_roles - 1]
    found_LK = reduced.pca_explained_variance_ratio_LK[:, : num_roles - 1]
    assert np.abs(found_LK - ratio_LK).max() <= 1e-5
    num_compared = 0
    for layer, ratio_K in enumerate(ratio_LK):
        gaps = np.abs(np.diff(np.concatenate([[np.inf], ratio_K, [golden["pca_ratio_fp32"][layer, num_roles - 1]]])))
        for k in range(num_roles - 1):
            if min(gaps[k], gaps[k + 1]) > 1e-3:
                cosine = float(golden["pca_components_fp32"][layer, k] @ reduced.pca_components_LKD[layer, k])
                assert abs(cosine) >= 1 - 1e-5, (layer, k)
                num_compared += 1
    assert num_compared > len(ratio_LK)


def test_scores_that_are_absent_stay_missing(golden_folder: Path, finished: StoreReader) -> None:
    name = finished.latest_scores()
    units = sorted(finished.ledger.committed())
    codes = finished.archetypes
    by_row = {
        r: (a, s)
        for rows in finished.scored_rows(units, name)
        for r, a, s in zip(rows.rollout_R, rows.archetype_R, rows.score_R, strict=True)
    }
    for part in finished.rollouts(units):
        for rollout in part:
            file = golden_folder / "scores" / f"{rollout.key.archetype}.json"
            scores = json.loads(file.read_text()) if file.exists() else {}
            code, score = by_row[rollout.index]
            assert codes[code] == rollout.key.archetype
            assert score == scores.get(f"pos_p{rollout.key.system_prompt}_q{rollout.key.question}", -1)
