"""What `reduce.stop` saves, on simulated runs at the paper's size: when would the run have ended, and how good is its axis?

python jobs/simulate_stopping.py                                       275 archetypes, 5 system prompts, 240 questions
python jobs/simulate_stopping.py --archetypes 24 --questions 60 --json stopping.json

Rows are a mean of their archetype, plus what the question brings (to everybody; to this archetype), what the system prompt
brings to the archetype, and noise of sampling, all with a spectrum that falls as a power law. How far rows of an archetype lie from their
mean, beside the length of the axis, is what decides: it is the row of the table. The order of work, the estimate and the rule are those
of a run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from persona_ray.reduce.convergence import BatchMeans, Look, StopRule
from persona_ray.rollouts.order import grid_walk, shuffled
from persona_ray.spec import Float32, Float64

SPREADS = (0.25, 0.5, 0.75, 1.0, 1.5)
"""Root mean square distance of rows from their archetype's mean, in lengths of the axis."""
SHARES = {"question": 0.35, "question x archetype": 0.25, "prompt x archetype": 0.05, "sampling": 0.35}
"""Of the variance within an archetype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Of the simulated experiment."""

    archetypes: int = 275
    prompts: int = 5
    questions: int = 240
    width: int = 512
    passing: float = 0.7
    """Share of rows of roles that the score filter lets pass."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """One simulated run."""

    spread: float
    rows_per_archetype: int
    """When the rule held; the whole plan if it never did."""
    share_of_plan: float
    cosine_with_full_plan: float
    cosine_with_truth: float
    cosine_of_full_plan_with_truth: float


class Rows:
    """Rows in work order, one wave (a row of every archetype, the default Assistant first) at a time; the same for one seed."""

    def __init__(self, size: Size, spread: float, seed: int) -> None:
        generator = np.random.default_rng([seed, 0])
        self._size, self._generator = size, generator
        # A spectrum like that of activations, as the root of the variance of each dim, of length 1.
        self._scale_D = np.arange(1.0, size.width + 1) ** -0.5
        self._scale_D /= np.linalg.norm(self._scale_D)
        num_groups = size.archetypes + 1
        self.mean_GD = self._drawn(num_groups, 1.0)
        self.mean_GD[0] += 1.5 * self._scale_D  # the Assistant stands at one end, not in the middle
        axis = np.linalg.norm(self.axis_D)
        length = {name: spread * axis * np.sqrt(share) for name, share in SHARES.items()}
        self._question_QD = self._drawn(size.questions, length["question"])
        self._question_seeds, self._prompt_seeds = [seed, 1], [seed, 2]
        self._lengths = length
        # Answers of another kind fail the filter: they lie elsewhere, and do not count.
        self.passes_WG = generator.random((size.prompts * size.questions, num_groups)) < size.passing
        self.passes_WG[:, 0] = True

    def _drawn(self, number: int, length: float, generator: np.random.Generator | None = None) -> Float64:
        """(number, D) of root mean square length `length`."""
        draw = generator or self._generator
        drawn_ND: Float64 = length * self._scale_D * draw.standard_normal((number, self._size.width))
        return drawn_ND

    @property
    def axis_D(self) -> Float64:
        """The true one."""
        axis_D: Float64 = self.mean_GD[0] - self.mean_GD[1:].mean(axis=0)
        return axis_D

    def wave(self, prompt: int, question: int) -> Float32:
        """(G, D)."""
        num_groups = self._size.archetypes + 1
        own = np.random.default_rng([*self._question_seeds, question])
        of_prompt = np.random.default_rng([*self._prompt_seeds, prompt])
        rows_GD = self.mean_GD + self._question_QD[question]
        rows_GD += self._drawn(num_groups, self._lengths["question x archetype"], own)
        rows_GD += self._drawn(num_groups, self._lengths["prompt x archetype"], of_prompt)
        rows_GD += self._drawn(num_groups, self._lengths["sampling"])
        return rows_GD.astype(np.float32)


def simulate(size: Size, spread: float, rule: StopRule, *, min_count: int = 10, seed: int = 0) -> Stopped:
    """The whole plan once; what the rule would have said on the way."""
    rows = Rows(size, spread, seed)
    num_groups = size.archetypes + 1
    batches = BatchMeans(num_groups, (1, size.width))
    groups_G, order = np.arange(num_groups), shuffled(size.questions, seed)
    early: Look | None = None
    ended_at = size.prompts * size.questions
    for wave, (prompt, place) in enumerate(grid_walk(size.prompts, size.questions)):
        passing = np.flatnonzero(rows.passes_WG[wave])
        batches.add(groups_G[passing], np.full(len(passing), wave), rows.wave(prompt, order[place])[passing, None])
        if early is None and rule.is_due(wave + 1):
            look = batches.look(min_count)
            if rule.take(look, wave + 1):
                early, ended_at = look, wave + 1
    full, truth = batches.look(min_count), Look(rows.axis_D[None], np.zeros(1))
    assert full is not None
    last = full if early is None else early
    return Stopped(
        spread,
        ended_at,
        ended_at / (size.prompts * size.questions),
        float(last.cosine_with(full)[0]),
        float(last.cosine_with(truth)[0]),
        float(full.cosine_with(truth)[0]),
    )


def table(found: Sequence[Stopped]) -> str:
    """For people."""
    lines = ["spread  rows per archetype  share of the plan  saved  cosine: full plan  truth  (full plan with truth)"]
    lines += [
        f"{run.spread:6.2f}  {run.rows_per_archetype:18,}  {run.share_of_plan:17.0%}  {1 - run.share_of_plan:5.0%}"
        f"  {run.cosine_with_full_plan:17.5f}  {run.cosine_with_truth:.5f}  {run.cosine_of_full_plan_with_truth:.5f}"
        for run in found
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, simulate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, default in asdict(Size()).items():
        parser.add_argument(f"--{field}", type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--cosine", type=float, default=0.999, help="of reduce.stop")
    parser.add_argument("--patience", type=int, default=3, help="of reduce.stop")
    parser.add_argument("--min-per-archetype", type=int, default=10, help="of reduce.stop")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated rows")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    given = vars(parser.parse_args(arguments))
    size = Size(**{field: given[field] for field in asdict(Size())})
    if min(size.archetypes, size.prompts, size.questions, size.width) < 2 or not 0 < size.passing <= 1:
        parser.error("at least two of everything, and a share of rows that pass between 0 and 1")
    rule = StopRule(cosine=given["cosine"], patience=given["patience"], min_per_archetype=given["min_per_archetype"])
    found = [simulate(size, spread, replace(rule), seed=given["seed"]) for spread in SPREADS]
    print(table(found))
    if given["json"]:
        document: dict[str, Any] = {"size": asdict(size), "shares": SHARES, "runs": [asdict(run) for run in found]}
        given["json"].write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
