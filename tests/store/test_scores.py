from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zarr

from persona_ray.errors import InputError, IntegrityError, StateError
from persona_ray.spec import Judgement
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores

Tree = Callable[[Path], dict[str, bytes]]


def judged(*scores: int) -> list[Judgement]:
    return [Judgement(score, f'{{"said": "score {score}"}}') for score in scores]


def test_scores_and_raw_answers_are_stored_once(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.fill(tmp_path)
    writer = ScoreWriter(str(tmp_path), "lexicon-ab", {"backend": "lexicon"})
    writer.write(2, toy.rollouts(2), judged(3, -1))
    before = tree(tmp_path)
    ScoreWriter(str(tmp_path), "lexicon-ab", {"backend": "lexicon"}).write(2, toy.rollouts(2), judged(0, 0))
    assert tree(tmp_path) == before
    group = zarr.open_group(tmp_path, path="scores/lexicon-ab", mode="r")
    assert group["score"][:].tolist() == [-1] * 8 + [3, -1, -1, -1]
    assert group["score"].metadata.dimension_names == ("rollout",)
    assert group.attrs["settings"] == {"backend": "lexicon"}
    raw = pq.read_table(tmp_path / "scores/lexicon-ab/raw/part-000002.parquet").to_pydict()
    assert raw == {"rollout": [8, 9], "score": [3, -1], "raw": ['{"said": "score 3"}', '{"said": "score -1"}']}


def test_after_a_crash_the_scores_follow_the_raw_answers_that_won(tmp_path: Path, toy: Any) -> None:
    toy.fill(tmp_path)
    ScoreWriter(str(tmp_path), "j", {}).write(0, toy.rollouts(0), judged(3, 2, 1, 0))
    (tmp_path / "scores/j/score/c/0").unlink()
    ScoreWriter(str(tmp_path), "j", {}).write(0, toy.rollouts(0), judged(0, 0, 0, 0))
    assert zarr.open_array(tmp_path, path="scores/j/score", mode="r")[:4].tolist() == [3, 2, 1, 0]


def test_the_judge_in_force_can_change_and_is_found_from_the_root(tmp_path: Path, toy: Any) -> None:
    store = open_store(toy.fill(tmp_path))
    for name in ("one", "two"):
        for unit in toy.plan.units:
            rollouts = toy.rollouts(unit)
            ScoreWriter(store.url, name, {}).write(unit, rollouts, judged(*[1] * len(rollouts)))
        publish_scores(store.url, name)
        assert store.latest_scores() == name
        assert store.scored_units(name) == {0, 1, 2}
    root = zarr.open_group(tmp_path, mode="r", use_consolidated=True)
    assert root["scores/one/score"].shape == root["scores/two/score"].shape == (12,)
    with pytest.raises(StateError, match="nobody"):
        publish_scores(store.url, "nobody")


def test_judgements_that_are_not_the_units(tmp_path: Path, toy: Any, tree: Tree) -> None:
    toy.fill(tmp_path)
    writer = pickle.loads(pickle.dumps(ScoreWriter(str(tmp_path), "j", {})))
    for unit, rollouts, judgements, words in (
        (0, toy.rollouts(1), judged(1, 1, 1, 1), "rows 0 to 3"),
        (0, toy.rollouts(0), judged(1), "1 judgements of 4"),
        (0, toy.rollouts(0), judged(1, 1, 4, 1), "score is 4"),
        (3, (), [], "in no plan"),
    ):
        with pytest.raises(IntegrityError, match=words):
            writer.write(unit, rollouts, judgements)
    assert not any("/c/" in key or key.endswith(".parquet") for key in tree(tmp_path) if key.startswith("scores/"))
    with pytest.raises(InputError, match="cannot name"):
        ScoreWriter(str(tmp_path), "../elsewhere", {})
