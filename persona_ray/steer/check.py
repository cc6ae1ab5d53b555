"""Does adding the axis move what the model says? An experiment with a control, on questions of its own.

Archetypes far from the Assistant are steered toward it, the default Assistant and its neighbours away from it, and the
share of the Assistant's words in real answers is counted. Layer and strength are chosen on one half of the questions and
measured on the other, beside the unsteered run and a random direction of the same norm. Who generates, and how words are
counted, is handed in; torch is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import Edit, Float32, SteeringArm, SteeringCheck, SteeringExample
from persona_ray.steer.direction import multiple, random_direction

FAR, NEAR = "far", "near"
MIN_QUESTIONS = 2
"""One to choose on, one to measure on."""

Asked = tuple[str, int]
"""Archetype and question."""
Request = tuple[Sequence[Asked], Edit | None]
"""Some (archetype, question) pairs, all under one edit."""
Ask = Callable[[Sequence[Request]], list[list[str]]]
"""The answers to several requests, which may be under way at once: for each request one answer for every pair, in order."""
CountWords = Callable[[str], tuple[int, int]]
"""(words of the Assistant's side, all lexicon words) in an answer."""
MakeEdit = Callable[[int, Float32], Edit]
"""Adds a vector (D,) after decoder block `layer`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckSize:
    """How much is asked. The defaults ask for about 560 answers: 28 + 9 x 28 for the choice, 5 x 56 for the measurement."""

    num_far: int = 4
    num_neighbours: int = 2
    """Beside the default Assistant."""
    num_layers: int = 3
    strengths: tuple[float, ...] = (3.0, 4.0, 5.0)
    """Multiples of the axis."""
    num_questions_choosing: int = 4
    num_questions_measuring: int = 8
    share_of_best: float = 0.67
    """Of the largest shift found, what a gentler edit must reach to be preferred."""
    words_kept: tuple[float, float] = (0.5, 1.5)
    """Lexicon words of the answers over those of the unsteered ones: a model that falls silent or repeats itself was broken, not moved."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One layer and strength, and what it did on the questions for choosing."""

    layer: int
    strength: float
    shift_toward: float
    """Rise of the Assistant's share of words in the far cohort, under + axis; -1..1."""
    shift_away: float
    """Its fall in the near cohort, under - axis; -1..1."""
    words_kept: float
    """Lexicon words of the edited answers over those of the unsteered ones, in the cohort where that is further from 1."""

    @property
    def shift(self) -> float:
        """The weaker of the two directions."""
        return min(self.shift_toward, self.shift_away)

    def as_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {
            "layer": self.layer,
            "strength": self.strength,
            "shift_toward": self.shift_toward,
            "shift_away": self.shift_away,
            "words_kept": self.words_kept,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What the check works with; `axis_LD` and `separation_L` follow `layers`."""

    axis_LD: Float32
    layers: Sequence[int]
    """Captured decoder blocks."""
    separation_L: Sequence[float | None]
    """How well the axis tells Assistant and roles apart; None or NaN: not known, tried last."""
    projections: Mapping[str, float]
    """Archetype -> position along the axis, at the layer where it separates best."""
    default_names: Sequence[str]
    questions: Mapping[int, str]
    """Index, as `ask` knows it -> text."""
    ask: Ask
    count_words: CountWords
    make_edit: MakeEdit
    seed: int = 0
    """Draws the random direction."""
    size: CheckSize = field(default_factory=CheckSize)

    def edit(self, layer: int, strength: float, *, random: bool = False) -> Edit | None:
        """Adds `strength` x axis, or x a random direction of its norm; None for strength 0."""
        if not strength:
            return None
        axis_D = self.axis_LD[list(self.layers).index(layer)]
        return self.make_edit(layer, multiple(random_direction(axis_D, self.seed) if random else axis_D, strength))

    def share(self, answers: Iterable[str]) -> float:
        """The Assistant's share of all lexicon words in the answers together; 0 where there is not one."""
        assistant, total = self.words(answers)
        return assistant / total if total else 0.0

    def words(self, answers: Iterable[str]) -> tuple[int, int]:
        """Summed counts over the answers."""
        counts = [self.count_words(answer) for answer in answers]
        return sum(assistant for assistant, _ in counts), sum(total for _, total in counts)


def check_steering(experiment: Experiment) -> SteeringCheck:
    """Chooses a layer and a strength, then measures them. All answers under one edit are asked for together.

    Raises InputError if there are too few archetypes or questions for it.
    """
    cohorts = choose_cohorts(experiment)
    choosing, measuring = split_questions(experiment)
    candidates = _try_candidates(experiment, cohorts, choosing)
    chosen = choose(candidates, experiment.size)
    arms, examples = _measure(experiment, cohorts, measuring, chosen)
    return SteeringCheck(
        layer=chosen.layer,
        strength=chosen.strength,
        cohorts=cohorts,
        questions_chosen_on=choosing,
        questions_measured_on=measuring,
        candidates=tuple(candidate.as_dict() for candidate in candidates),
        arms=arms,
        examples=examples,
    )


def choose_cohorts(experiment: Experiment) -> dict[str, tuple[str, ...]]:
    """far: the roles of lowest projection; near: the default Assistant and the roles of highest. No role is in both."""
    defaults = tuple(name for name in experiment.default_names if name in experiment.projections)
    roles = sorted((name for name in experiment.projections if name not in defaults), key=lambda name: (experiment.projections[name], name))
    if not defaults or not roles:
        raise InputError("the steering check needs the default Assistant and at least one archetype with a role vector")
    num_far = min(experiment.size.num_far, -(-len(roles) // 2))
    num_neighbours = min(experiment.size.num_neighbours, len(roles) - num_far)
    return {FAR: tuple(roles[:num_far]), NEAR: (*defaults, *reversed(roles[len(roles) - num_neighbours :]))}


def split_questions(experiment: Experiment) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(for choosing, for measuring): taken from every second question each, spread evenly, none in both."""
    questions = sorted(experiment.questions)
    if len(questions) < 2:
        raise InputError(f"the steering check needs at least 2 questions, this job has {len(questions)}")
    size = experiment.size
    return _spread(questions[1::2], size.num_questions_choosing), _spread(questions[::2], size.num_questions_measuring)


def choose_layers(experiment: Experiment) -> tuple[int, ...]:
    """The layers of largest separation; not the last captured one if there is another, after which nothing could act on the edit."""
    known = {layer: _number(value) for layer, value in zip(experiment.layers, experiment.separation_L, strict=True)}
    candidates = sorted(experiment.layers)[:-1] or list(experiment.layers)
    return tuple(sorted(candidates, key=lambda layer: (-known[layer], layer))[: experiment.size.num_layers])


def _number(value: float | None) -> float:
    return -np.inf if value is None or np.isnan(value) else value


def _spread(questions: Sequence[int], number: int) -> tuple[int, ...]:
    number = min(number, len(questions))
    return tuple(questions[position * len(questions) // number] for position in range(number))


def _pairs(members: Sequence[str], questions: Sequence[int]) -> list[Asked]:
    return [(name, question) for name in members for question in questions]


def _try_candidates(experiment: Experiment, cohorts: Mapping[str, tuple[str, ...]], questions: Sequence[int]) -> list[Choice]:
    far, near = _pairs(cohorts[FAR], questions), _pairs(cohorts[NEAR], questions)
    tried = [(layer, strength) for layer in choose_layers(experiment) for strength in experiment.size.strengths]
    requests: list[Request] = [(far, None), (near, None)]
    for layer, strength in tried:
        requests += [(far, experiment.edit(layer, strength)), (near, experiment.edit(layer, -strength))]
    far_plain, near_plain, *edited = experiment.ask(requests)
    return [
        Choice(
            layer,
            strength,
            shift_toward=experiment.share(toward) - experiment.share(far_plain),
            shift_away=experiment.share(near_plain) - experiment.share(away),
            words_kept=max(_kept(experiment, toward, far_plain), _kept(experiment, away, near_plain), key=lambda kept: abs(kept - 1)),
        )
        for (layer, strength), toward, away in zip(tried, edited[::2], edited[1::2], strict=True)
    ]


def _kept(experiment: Experiment, edited: Sequence[str], plain: Sequence[str]) -> float:
    before = experiment.words(plain)[1]
    return experiment.words(edited)[1] / before if before else 1.0


def choose(candidates: Sequence[Choice], size: CheckSize) -> Choice:
    """The gentlest edit that comes near the best one: a stronger one moves the words further and the sentences to pieces.

    Both directions must work, so the weaker one counts. A candidate that broke the model is taken only if all did.
    """
    least, most = size.words_kept
    whole = [candidate for candidate in candidates if least <= candidate.words_kept <= most] or list(candidates)
    best = max(candidate.shift for candidate in whole)
    near_best = [candidate for candidate in whole if candidate.shift >= min(best, size.share_of_best * best)]
    return min(near_best, key=lambda candidate: (candidate.strength, -candidate.shift))


def _measure(
    experiment: Experiment, cohorts: Mapping[str, tuple[str, ...]], questions: Sequence[int], chosen: Choice
) -> tuple[tuple[SteeringArm, ...], tuple[SteeringExample, ...]]:
    pairs = {cohort: _pairs(members, questions) for cohort, members in cohorts.items()}
    arms = [(label, strength, random, cohort) for label, strength, random in _arms(chosen.strength) for cohort in pairs]
    told = experiment.ask([(pairs[cohort], experiment.edit(chosen.layer, strength, random=random)) for _, strength, random, cohort in arms])
    answers: dict[str, dict[str, list[str]]] = {}
    measured = []
    for (label, strength, _, cohort), texts in zip(arms, told, strict=True):
        answers.setdefault(label, {})[cohort] = texts
        share = experiment.share(texts)
        measured.append(SteeringArm(label=label, cohort=cohort, strength=strength, assistant_share=share, num_answers=len(texts)))
    examples = (_typical(experiment, pairs[FAR], FAR, "+axis", answers), _typical(experiment, pairs[NEAR], NEAR, "-axis", answers))
    return tuple(measured), examples


def _arms(strength: float) -> tuple[tuple[str, float, bool], ...]:
    """Label, signed strength, and whether the direction is random."""
    plain, on_axis, random = ("none", 0.0, False), ("+axis", strength, False), ("+random", strength, True)
    return plain, on_axis, ("-axis", -strength, False), random, ("-random", -strength, True)


def _typical(
    experiment: Experiment, pairs: Sequence[Asked], cohort: str, label: str, answers: Mapping[str, Mapping[str, Sequence[str]]]
) -> SteeringExample:
    """The median of the cohort by shift under `label`, not the best one: what a reader should expect to see."""
    before_and_after = zip(answers["none"][cohort], answers[label][cohort], strict=True)
    shifts = [experiment.share([after]) - experiment.share([before]) for before, after in before_and_after]
    median = sorted(range(len(pairs)), key=lambda position: shifts[position])[len(pairs) // 2]
    name, question = pairs[median]
    return SteeringExample(
        archetype=name,
        question=experiment.questions[question],
        answers={arm: told[cohort][median] for arm, told in answers.items()},
    )
