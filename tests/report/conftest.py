from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persona_ray.reduce.space_pair import Space, SpacePair, compare_spaces
from persona_ray.report.data import ReportData
from persona_ray.spec import Reduced, SteeringArm, SteeringCheck, SteeringExample

MakeReduced = Callable[..., Reduced]

SHARES = {
    "far": {"none": 0.08, "+axis": 0.66, "-axis": 0.02, "+random": 0.09, "-random": 0.07},
    "near": {"none": 0.91, "+axis": 0.99, "-axis": 0.21, "+random": 0.9, "-random": 0.9},
}


def _reduced(roles_ALD: np.ndarray, default_LD: np.ndarray, names: Sequence[str], **attributes: Any) -> Reduced:
    """What a reduction makes of these vectors; the last archetype is the default Assistant."""
    num_roles, num_layers, _ = roles_ALD.shape
    axis_LD = default_LD - roles_ALD.mean(axis=0)
    components, variances, ratios, cosines = [], [], [], []
    for layer in range(num_layers):
        _, values, rows_KD = np.linalg.svd(roles_ALD[:, layer] - roles_ALD[:, layer].mean(axis=0), full_matrices=False)
        rows_KD[0] *= np.sign(rows_KD[0] @ axis_LD[layer]) or 1
        variance_K = values**2 / (num_roles - 1)
        components.append(rows_KD)
        variances.append(variance_K)
        ratios.append(variance_K / variance_K.sum())
        cosines.append(rows_KD[0] @ axis_LD[layer] / np.linalg.norm(axis_LD[layer]))
    unknown_1LD = np.full((1, *roles_ALD.shape[1:]), np.nan)
    return Reduced(
        name="0123456789abcdef",
        archetypes=(*names, "default"),
        layers=tuple(range(num_layers)),
        role_vector_ALD=np.concatenate([roles_ALD, unknown_1LD]).astype(np.float32),
        role_count_A=np.arange(20, 21 + num_roles, dtype=np.int32),
        default_vector_LD=default_LD.astype(np.float32),
        axis_LD=axis_LD.astype(np.float32),
        pca_components_LKD=np.array(components, np.float32),
        pca_explained_variance_LK=np.array(variances, np.float32),
        pca_explained_variance_ratio_LK=np.array(ratios, np.float32),
        cos_pc1_axis_L=np.array(cosines, np.float32),
        attributes={
            "best_layer": num_layers // 2,
            "best_layer_reason": f"layer {num_layers // 2} is the middle one",
            "separation": [None, *np.linspace(1.0, 2.0, num_layers - 1).tolist()],
            "default_archetypes": ["default"],
            "judge": "lexicon-12345678",
            "min_score": 3,
            "min_count": 10,
            "preset": "paper",
            "filter": "rows of score >= 3 by lexicon-12345678; at least 10 of them for a role vector; all rows of the default Assistant",
        }
        | attributes,
    )


@pytest.fixture(scope="session")
def make_reduced() -> MakeReduced:
    """Roles spread along a planted direction, more so in later layers; role_0 is the farthest from the Assistant. `spread` is the noise."""

    def make(
        num_roles: int = 12,
        num_layers: int = 4,
        hidden: int = 16,
        *,
        names: Sequence[str] | None = None,
        spread: float = 0.3,
        seed: int = 0,
        **attributes: Any,
    ) -> Reduced:
        rng = np.random.default_rng(seed)
        toward_A = np.linspace(-1, 1, num_roles)
        direction_D = np.eye(hidden)[0]
        gain_L11 = np.arange(1, num_layers + 1)[:, None]
        roles_ALD = toward_A[:, None, None] * direction_D * gain_L11 + spread * rng.normal(size=(num_roles, num_layers, hidden))
        default_LD = 2.0 * direction_D * gain_L11 + spread * rng.normal(size=(num_layers, hidden))
        return _reduced(roles_ALD, default_LD, names or [f"role_{number}" for number in range(num_roles)], **attributes)

    return make


@pytest.fixture(scope="session")
def steering() -> SteeringCheck:
    strength = {"none": 0.0, "+axis": 2.0, "-axis": -2.0, "+random": 2.0, "-random": -2.0}
    return SteeringCheck(
        layer=2,
        strength=2.0,
        cohorts={"far": ("role_0", "role_1"), "near": ("default", "role_11")},
        questions_chosen_on=(1, 3),
        questions_measured_on=(0, 2, 4),
        candidates=(
            {"layer": 1, "strength": 2.0, "shift_toward": 0.3, "shift_away": 0.2, "words_kept": 0.9},
            {"layer": 2, "strength": 2.0, "shift_toward": 0.5, "shift_away": 0.6, "words_kept": 0.8},
        ),
        arms=tuple(
            SteeringArm(label=label, cohort=cohort, strength=strength[label], assistant_share=share, num_answers=6)
            for cohort, shares in SHARES.items()
            for label, share in shares.items()
        ),
        examples=(
            SteeringExample(
                archetype="role_0",
                question="What is a good friend?",
                answers={label: f"the answer under {label}" for label in strength},
            ),
        ),
    )


@pytest.fixture(scope="session")
def run_facts() -> dict[str, Any]:
    return {
        "title": "a-run",
        "model_id": "builtin:tiny-persona",
        "identity_digest": "5f" * 32,
        "ledger_digest": "ab" * 32,
        "store_url": "/data/store",
        "rows": {"asked": 1560, "stored": 1552, "refused": 8, "reasons": {"the answer is empty": 8}},
        "units": 13,
        "seconds": {"capture": 48.2, "generate": 100.0},
        "hardware": "2 CPU cores",
        "versions": {"ray": "2.49.0"},
        "date": "2026-07-14T10:22:31Z",
        "wall_plug": "green",
    }


@pytest.fixture(scope="session")
def report(make_reduced: MakeReduced, steering: SteeringCheck, run_facts: dict[str, Any]) -> ReportData:
    return ReportData(reduced=make_reduced(), steering=steering, run=run_facts)


@pytest.fixture(scope="session")
def without(report: ReportData) -> Callable[[str], ReportData]:
    """The report of a run that did not do the named part."""

    def make(part: str) -> ReportData:
        if part == "steering":
            return replace(report, steering=None)
        attributes = {**report.reduced.attributes, "judge": None, "min_score": None, "filter": "no judge: every row counts"}
        return replace(report, reduced=replace(report.reduced, attributes=attributes))

    return make


def _space(reduced: Reduced, label: str) -> Space:
    return Space.of(reduced, label=label, model_id=f"model of {label}", num_blocks=4, is_depth_known=True, num_components=3)


@pytest.fixture(scope="session")
def as_space() -> Callable[[Reduced, str], Space]:
    """What is compared of a result."""
    return _space


@pytest.fixture(scope="session")
def make_pair(make_reduced: MakeReduced) -> Callable[..., SpacePair]:
    """The space of `report`, called "a", and one of another width with noise of its own."""

    def make(label: str = "b", **settings: Any) -> SpacePair:
        return compare_spaces(_space(make_reduced(), "a"), _space(make_reduced(**({"hidden": 20, "seed": 1} | settings)), label))

    return make
