"""Scores for what a store holds: a unit that a judge has scored is never judged by it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from persona_ray.spec import Judge, Progress, ProgressCallback
from persona_ray.store.reader import StoreReader
from persona_ray.store.scores import ScoreWriter, publish_scores


def judge_store(judge: Judge | None, store: StoreReader, progress: Progress) -> None:
    """Every committed unit gets its scores, unless it has them; then this judge is the one in force."""
    if judge is None:
        return
    todo = sorted(store.ledger.committed() - store.scored_units(judge.name))
    with progress.phase("judge", len(todo), "units") as advance:
        judge_units(judge, store, todo, advance)
    publish_scores(store.url, judge.name)


def judge_units(judge: Judge | None, store: StoreReader, units: Sequence[int], advance: ProgressCallback = lambda _: None) -> None:
    """Scores for those of `units` that have none by this judge; committed ones only."""
    if judge is None:
        return
    scores, scored = ScoreWriter(store.url, judge.name, judge.settings), store.scored_units(judge.name)
    todo = [unit for unit in units if unit not in scored]
    for unit, rollouts in zip(todo, store.rollouts(todo), strict=True):
        scores.write(unit, rollouts, judge.judge(rollouts))
        advance(1)


def rows_by_score(store: StoreReader, judge_name: str) -> dict[int, int]:
    """Committed, stored rows of each score by this judge, -1 for those without one; by rising score."""
    counted = Counter(store.rows().scores(judge_name).tolist())
    return {score: counted[score] for score in sorted(counted)}
