from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from persona_ray.config import ExtraConfig, ReduceConfig
from persona_ray.reduce.moments import GroupMoments, Moments
from persona_ray.reduce.needs import who_needs_more
from persona_ray.reduce.persona_space import Block, persona_space
from persona_ray.reduce.vectors import standard_error
from persona_ray.spec import Reduced, ScoredRows

ARCHETYPES = ("helper", "sure", "vague", "rare")
NOISE = (0.1, 0.1, 8.0, 0.1)
COUNTS = (40, 40, 40, 3)


def space_of(noise: tuple[float, ...] = NOISE, counts: tuple[int, ...] = COUNTS) -> Reduced:
    generator = np.random.default_rng(0)
    means_AD = np.eye(4, 6) * 5
    archetype_R = np.repeat(np.arange(4, dtype=np.int32), counts)
    rows_RD = means_AD[archetype_R] + np.array(noise)[archetype_R, None] * generator.standard_normal((len(archetype_R), 6))
    rows = ScoredRows(np.arange(len(archetype_R)), archetype_R, np.full(len(archetype_R), -1, np.int8), rows_RD[:, None].astype(np.float32))
    return persona_space(
        [Block((7,), Moments.of(rows))],
        archetypes=ARCHETYPES,
        default_archetypes=("helper",),
        config=ReduceConfig(min_count=10, somewhat=False),
        judge_name=None,
        ledger_digest="d",
    )


def test_who_is_uncertain_or_has_too_few_rows_needs_more_and_nobody_else() -> None:
    needs = who_needs_more(space_of(), ExtraConfig())
    assert list(needs) == ["vague", "rare"]
    assert needs["rare"] == "3 rows count, and a role vector takes 10"
    assert "of its distance from the mean role" in needs["vague"]
    assert list(who_needs_more(space_of(), ExtraConfig(max_error=100))) == ["rare"]


def test_the_default_assistant_is_measured_by_the_length_of_the_axis() -> None:
    needs = who_needs_more(space_of(noise=(9.0, 0.1, 0.1, 0.1)), ExtraConfig())
    assert "the length of the axis" in needs["helper"]
    space = space_of()
    bare = replace(space, attributes={**space.attributes, "vector_error": {**space.attributes["vector_error"], "helper": [None]}})
    assert needs.keys() == who_needs_more(bare, ExtraConfig(max_error=1)).keys()


def test_the_standard_error_is_how_means_of_other_rows_scatter() -> None:
    generator = np.random.default_rng(1)
    scale_LD = np.array([[1.0, 4.0, 0.0], [0.5, 0.5, 2.0]])
    sets = generator.standard_normal((2000, 12, 2, 3)) * scale_LD
    real_L = np.sqrt((sets.mean(axis=1) ** 2).sum(axis=-1).mean(axis=0))
    told_L = np.sqrt(np.mean([standard_error(GroupMoments.of(rows.astype(np.float32))) ** 2 for rows in sets[:500]], axis=0))
    assert told_L == pytest.approx(real_L, rel=0.05)
    assert np.isnan(standard_error(GroupMoments.of(sets[0, :1].astype(np.float32)))).all()
