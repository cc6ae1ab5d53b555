from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from persona_ray.errors import InputError
from persona_ray.spec import Edit, Float32
from persona_ray.steer.check import Asked, CheckSize, Experiment, Request, check_steering, choose_cohorts, choose_layers, split_questions

LAYERS = (0, 2, 4, 6)
WIDTH = 64
AXIS_LD = np.random.default_rng(3).standard_normal((len(LAYERS), WIDTH)).astype(np.float32)
PROJECTIONS = {"default": 5.0, "lawyer": 4.0, "doctor": 3.0, "poet": 0.0, "witch": -1.0, "ghost": -2.0, "void": -3.0, "demon": -4.0}
NUM_WORDS = 40
GAIN = {0: 0.05, 2: 0.25, 4: 0.15, 6: 0.9}
"""Layer -> shift of the share for each axis added."""
BREAKS_BEYOND = 2.0
SIZE = CheckSize(num_layers=3, strengths=(1.0, 2.0, 3.0))


class RecordedEdit:
    def __init__(self, layer: int, vector_D: Float32) -> None:
        self.layer, self.vector_D = layer, vector_D

    def __call__(self, hidden_BTD: Any) -> Any:
        return hidden_BTD


class FakeModel:
    """Says as many of the Assistant's words as its projection tells; steering moves it, at layer 2 most; beyond 2 axes it falls silent."""

    def __init__(self, words_when_broken: int = 1) -> None:
        self.words_when_broken = words_when_broken
        self.asked: list[tuple[tuple[Asked, ...], RecordedEdit | None]] = []

    def ask(self, requests: Sequence[Request]) -> list[list[str]]:
        return [self.answers(pairs, edit) for pairs, edit in requests]

    def answers(self, pairs: Sequence[Asked], edit: Edit | None) -> list[str]:
        assert edit is None or isinstance(edit, RecordedEdit)
        self.asked.append((tuple(pairs), edit))
        return [self.answer(archetype, edit) for archetype, _ in pairs]

    def answer(self, archetype: str, edit: RecordedEdit | None) -> str:
        pushed = 0.0
        if edit is not None:
            axis_D = AXIS_LD[LAYERS.index(edit.layer)]
            strength = float(edit.vector_D @ axis_D / (axis_D @ axis_D))
            if abs(strength) > BREAKS_BEYOND + 0.01:
                return " ".join(["good" if strength > 0 else "dark"] * self.words_when_broken)
            pushed = GAIN[edit.layer] * strength
        share = min(1.0, max(0.0, (0.9 if PROJECTIONS[archetype] > 1 else 0.1) + pushed))
        good = round(NUM_WORDS * share)
        return " ".join(["good"] * good + ["dark"] * (NUM_WORDS - good))


def count_words(text: str) -> tuple[int, int]:
    words = text.split()
    return words.count("good"), len(words)


def experiment_of(model: FakeModel, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "axis_LD": AXIS_LD,
        "layers": LAYERS,
        "separation_L": [1.0, 3.0, 2.0, 9.0],
        "projections": PROJECTIONS,
        "default_names": ("default",),
        "questions": {index: f"question {index}?" for index in range(0, 60, 2)},
        "ask": model.ask,
        "count_words": count_words,
        "make_edit": RecordedEdit,
        "size": SIZE,
    }
    return Experiment(**(settings | changes))


def test_the_best_working_layer_and_strength_are_chosen() -> None:
    found = check_steering(experiment_of(FakeModel()))
    assert (found.layer, found.strength) == (2, 2.0)
    assert {candidate["layer"] for candidate in found.candidates} == {0, 2, 4}
    assert len(found.candidates) == 9


@pytest.mark.parametrize("words_when_broken", [1, 3 * NUM_WORDS], ids=["falls silent", "repeats itself"])
def test_a_strength_that_breaks_the_model_is_not_taken_for_success(words_when_broken: int) -> None:
    found = check_steering(experiment_of(FakeModel(words_when_broken)))
    broken = [candidate for candidate in found.candidates if candidate["strength"] == 3.0]
    assert all(not 0.5 <= candidate["words_kept"] <= 1.5 for candidate in broken)
    assert max(broken, key=lambda candidate: candidate["shift_toward"])["shift_toward"] > 0.8
    assert found.strength == 2.0


def test_arms_show_the_axis_moving_both_cohorts_and_random_not() -> None:
    arms = {(arm.label, arm.cohort): arm for arm in check_steering(experiment_of(FakeModel())).arms}
    assert len(arms) == 10
    share = {key: arm.assistant_share for key, arm in arms.items()}
    assert share["none", "far"] == pytest.approx(0.1)
    assert share["+axis", "far"] == pytest.approx(0.6)
    assert share["none", "near"] == pytest.approx(0.9)
    assert share["-axis", "near"] == pytest.approx(0.4)
    for label in ("+random", "-random"):
        assert abs(share[label, "far"] - share["none", "far"]) < 0.2
        assert abs(share[label, "near"] - share["none", "near"]) < 0.2
    assert arms["-axis", "near"].strength == -2.0
    assert arms["+axis", "far"].num_answers == 4 * 8
    assert arms["+axis", "near"].num_answers == 3 * 8


def test_the_random_arm_has_the_norm_of_the_axis_and_the_sign_flips() -> None:
    model = FakeModel()
    check_steering(experiment_of(model))
    plain, plus, minus, random, opposite = (edit for _, edit in model.asked[-10::2])
    assert plain is None
    assert plus is not None
    assert minus is not None
    assert random is not None
    assert opposite is not None
    np.testing.assert_allclose(plus.vector_D, 2 * AXIS_LD[1], rtol=1e-6)
    np.testing.assert_array_equal(minus.vector_D, -plus.vector_D)
    assert np.linalg.norm(random.vector_D) == pytest.approx(np.linalg.norm(plus.vector_D), rel=1e-5)
    np.testing.assert_array_equal(opposite.vector_D, -random.vector_D)
    cosine = random.vector_D @ plus.vector_D / np.linalg.norm(plus.vector_D) ** 2
    assert abs(cosine) < 0.5


def test_choosing_and_measuring_share_no_question() -> None:
    model = FakeModel()
    found = check_steering(experiment_of(model))
    assert not set(found.questions_chosen_on) & set(found.questions_measured_on)
    assert (len(found.questions_chosen_on), len(found.questions_measured_on)) == (4, 8)
    choosing = {question for pairs, _ in model.asked[:-10] for _, question in pairs}
    measuring = {question for pairs, _ in model.asked[-10:] for _, question in pairs}
    assert choosing == set(found.questions_chosen_on)
    assert measuring == set(found.questions_measured_on)


def test_the_bill_is_what_the_docstring_says() -> None:
    model = FakeModel()
    check_steering(experiment_of(model))
    assert sum(len(pairs) for pairs, _ in model.asked) == 28 + 9 * 28 + 5 * 56
    assert len(model.asked) == 2 + 2 * 9 + 2 * 5


def test_examples_hold_one_question_of_each_cohort_under_every_arm() -> None:
    found = check_steering(experiment_of(FakeModel()))
    assert [example.archetype in found.cohorts[cohort] for example, cohort in zip(found.examples, ("far", "near"), strict=True)] == [
        True,
        True,
    ]
    for example in found.examples:
        assert set(example.answers) == {"none", "+axis", "-axis", "+random", "-random"}
        assert example.question.startswith("question ")
    far, near = found.examples
    assert count_words(far.answers["+axis"])[0] > count_words(far.answers["none"])[0]
    assert count_words(near.answers["-axis"])[0] < count_words(near.answers["none"])[0]


def test_cohorts_are_the_two_ends() -> None:
    assert choose_cohorts(experiment_of(FakeModel())) == {
        "far": ("demon", "void", "ghost", "witch"),
        "near": ("default", "lawyer", "doctor"),
    }


@pytest.mark.parametrize("number", range(1, 7))
def test_small_catalogues_never_put_a_role_into_both_cohorts(number: int) -> None:
    projections = {"default": 9.0, **{f"role{index}": float(index) for index in range(number)}}
    cohorts = choose_cohorts(experiment_of(FakeModel(), projections=projections))
    assert cohorts["far"]
    assert cohorts["near"][0] == "default"
    assert not set(cohorts["far"]) & set(cohorts["near"])


@pytest.mark.parametrize(
    ("separation_L", "expected"),
    [([1.0, 3.0, 2.0, 9.0], (2, 4, 0)), ([None, 3.0, math.nan, 9.0], (2, 0, 4)), ([None] * 4, (0, 2, 4))],
)
def test_layers_go_by_separation_and_the_last_is_left_out(separation_L: list[float | None], expected: tuple[int, ...]) -> None:
    assert choose_layers(experiment_of(FakeModel(), separation_L=separation_L)) == expected


def test_a_single_layer_is_used() -> None:
    experiment = experiment_of(FakeModel(), layers=(2,), axis_LD=AXIS_LD[1:2], separation_L=[1.0], size=replace(SIZE, num_layers=3))
    assert choose_layers(experiment) == (2,)


def test_few_questions_are_halved() -> None:
    chosen, measured = split_questions(experiment_of(FakeModel(), questions={3: "a", 9: "b", 12: "c"}))
    assert (chosen, measured) == ((9,), (3, 12))


def test_one_question_is_too_few() -> None:
    with pytest.raises(InputError, match="at least 2 questions, this job has 1"):
        check_steering(experiment_of(FakeModel(), questions={0: "a"}))


def test_no_role_or_no_default_is_too_few() -> None:
    for projections in ({"default": 1.0}, {"ghost": 1.0}):
        with pytest.raises(InputError, match="default Assistant and at least one archetype"):
            check_steering(experiment_of(FakeModel(), projections=projections))


def test_a_model_without_lexicon_words_gives_shares_of_zero() -> None:
    class Silent(FakeModel):
        def answer(self, archetype: str, edit: RecordedEdit | None) -> str:
            return ""

    assert {arm.assistant_share for arm in check_steering(experiment_of(Silent())).arms} == {0.0}
