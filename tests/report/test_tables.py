from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.console import Console, RenderableType

from persona_ray.report.tables import axis_json, axis_table, run_table, steering_json, steering_table
from persona_ray.spec import Reduced, SteeringCheck

MakeReduced = Callable[..., Reduced]


def printed(table: RenderableType) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_axis_json_is_strict_json_with_all_layers_and_archetypes(make_reduced: MakeReduced) -> None:
    found = json.loads(json.dumps(axis_json(make_reduced()), allow_nan=False))
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, 3]
    assert found["layers"][0]["separation"] is None
    assert found["best_layer"] == 2
    assert len(found["ranking"]) == 13
    assert found["ranking"][0] == {"archetype": "default", "position": 1.0, "rows": 32, "is_default": True}


def test_axis_table_shows_both_ends_and_counts_the_rest(make_reduced: MakeReduced) -> None:
    reduced = make_reduced()
    ranked = [row["archetype"] for row in axis_json(reduced)["ranking"]]
    text = printed(axis_table(reduced, top=2))
    assert "2 (best)" in text
    assert "9 more" in text
    for place, name in enumerate(ranked):
        assert (f" {name} " in text) == (place < 2 or place >= 11)
    assert "rows of score >= 3" in text


def test_components_of_rollouts_and_massive_dims_are_told_where_they_are_known(make_reduced: MakeReduced) -> None:
    plain = make_reduced()
    text = printed(axis_table(plain))
    assert "rollouts" not in text
    assert "dims" not in text
    dims = {
        "massive_dims": [{}, {}, {"7": 52.4}, {}],
        "axis_share_of_massive_dims": [0, 0, 0.125, 0],
        "axis_participation": [3.0, 3.0, 9.6, 3.0],
    }
    known = replace(
        plain,
        cos_rollout_pc1_axis_L=np.array([0.1, 0.2, 0.345, 0.4], np.float32),
        rollout_pca_explained_variance_ratio_LK=np.full((4, 2), 0.25, np.float32),
        attributes={**plain.attributes, **dims},
    )
    text = printed(axis_table(known)).replace("\u00a0", " ")
    assert "rollouts: cos(PC1, axis)" in text
    assert "About 10 dims carry the axis at layer 2" in text
    assert "7 (52 x)" in text
    assert "They hold 12 % of its squared length" in text or "They hold 13 % of its squared length" in text
    (layer,) = [layer for layer in axis_json(known)["layers"] if layer["layer"] == 2]
    assert layer["dims"] == {"massive": {"7": 52.4}, "share_of_massive": 0.125, "participation": 9.6}
    assert layer["rollouts"]["cos_pc1_axis"] == pytest.approx(0.345)


def test_axis_table_does_not_repeat_a_line_of_a_short_list(make_reduced: MakeReduced) -> None:
    text = printed(axis_table(make_reduced(num_roles=4), top=10))
    assert [text.count(f"role_{code} ") for code in range(4)] == [1, 1, 1, 1]
    assert "more" not in text


@pytest.mark.parametrize("name", ["[bold]loud[/bold]", "[/oops]"])
def test_names_are_not_read_as_markup(make_reduced: MakeReduced, name: str) -> None:
    reduced = make_reduced(num_roles=3, names=[name, "b", "c"])
    assert name in printed(axis_table(reduced))


def test_steering_table_and_json_tell_the_same(steering: SteeringCheck) -> None:
    text = printed(steering_table(steering)).replace("\u00a0", " ")
    assert text.count("66 %") == text.count("21 %") == 1
    found = json.loads(json.dumps(steering_json(steering), allow_nan=False))
    assert len(found["arms"]) == 10
    assert {"cohort": "far", "label": "+axis", "strength": 2.0, "assistant_share": 0.66, "num_answers": 6} in found["arms"]


def test_run_table_ends_with_counts_and_reasons(run_facts: dict[str, Any]) -> None:
    text = printed(run_table(run_facts))
    assert "1,560 asked, 1,552 stored, 8 refused" in text
    assert "8 rows: the answer is empty" in text
    assert "/data/store" in text
