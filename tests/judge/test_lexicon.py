from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import InputError
from persona_ray.judge.lexicon import Lexicon, LexiconJudge
from persona_ray.spec import NOT_SCORED, FinishReason, Rollout, RowKey

CONTENT: dict[str, Any] = {
    "archetypes": {
        "default": {"group": "assistant", "words": ["summary", "option"]},
        "accountant": {"group": "professional", "words": ["ledger", "audit", "option"]},
        "ghost": {"group": "mystical", "words": ["grave", "mist", "o'er"]},
        "witch": {"group": "mystical", "words": ["cauldron", "mist"]},
    },
    "groups": {"assistant": ["helpful"], "professional": ["client"], "mystical": ["moon", "helpful"]},
    "assistant_side": ["assistant", "professional"],
}


def judge_of(content: dict[str, Any] = CONTENT) -> LexiconJudge:
    return LexiconJudge(Lexicon.model_validate(content))


def rollout(archetype: str, response: str) -> Rollout:
    return Rollout(0, RowKey(archetype, 0, 0), "", "q", response, np.zeros(2, np.int32), 1, 2, FinishReason.STOP)


@pytest.mark.parametrize(
    ("archetype", "response", "score"),
    [
        ("ghost", "The grave is full of mist.", 3),
        ("ghost", "Grave grave grave ledger", 3),
        ("ghost", "GRAVE, grave! ledger", 2),
        ("ghost", "grave ledger", 2),
        ("ghost", "grave ledger audit summary", 1),
        ("ghost", "grave ledger audit summary cauldron", 0),
        ("ghost", "ledger", 0),
        ("ghost", "Nothing of note here.", 0),
        ("ghost", "", 0),
        ("ghost", "O'er the hills", 3),
        ("ghost", "gravely misty", 0),
        ("ghost", "grave moon client helpful", 3),
        ("witch", "mist", 3),
        ("accountant", "option", 3),
        ("default", "option", 3),
    ],
)
def test_scores(archetype: str, response: str, score: int) -> None:
    (judgement,) = judge_of().judge([rollout(archetype, response)])
    assert judgement.score == score


def test_raw_holds_the_counts() -> None:
    (judgement,) = judge_of().judge([rollout("ghost", "grave ledger moon mist")])
    assert json.loads(judgement.raw) == {"own": 2, "lexicon": 3, "share": 0.6667}


def test_an_unknown_archetype_is_not_scored_and_says_so() -> None:
    (judgement,) = judge_of().judge([rollout("pirate", "grave")])
    assert judgement.score == NOT_SCORED
    assert "pirate is not in the lexicon" in judgement.raw


def test_one_judgement_each_in_order() -> None:
    scores = [
        judgement.score for judgement in judge_of().judge([rollout("ghost", "grave"), rollout("pirate", ""), rollout("ghost", "audit")])
    ]
    assert scores == [3, NOT_SCORED, 0]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("The summary for the client: a grave ledger, by the moon.", (3, 5)),
        ("helpful", (0, 0)),
        ("no word of any list", (0, 0)),
        ("mist mist", (0, 2)),
    ],
)
def test_the_share_of_the_assistants_side(text: str, counts: tuple[int, int]) -> None:
    assert judge_of().assistant_share(text) == counts


@given(st.lists(st.sampled_from(["grave", "mist", "ledger", "summary", "moon", "client", "helpful", "of"])))
def test_shares_add_up_over_texts(words: list[str]) -> None:
    judge = judge_of()
    assistant, total = judge.assistant_share(" ".join(words))
    assert (assistant, total) == tuple(np.sum([judge.assistant_share(word) for word in words] or [(0, 0)], axis=0))
    assert 0 <= assistant <= total


def test_the_name_follows_the_content_and_not_the_order() -> None:
    reordered = json.loads(json.dumps(CONTENT))
    reordered["archetypes"]["ghost"]["words"].reverse()
    other = json.loads(json.dumps(CONTENT))
    other["archetypes"]["ghost"]["words"].append("shroud")
    assert judge_of().name == judge_of(reordered).name != judge_of(other).name
    assert judge_of().name.startswith("lexicon-")
    json.dumps(judge_of().settings)


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps(CONTENT))
    assert Lexicon.load(path) == Lexicon.model_validate(CONTENT)


def change(**changes: Any) -> str:
    return json.dumps({**CONTENT, **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ("[]", "lexicon"),
        (change(colour="red"), "colour"),
        (change(assistant_side=["nobody"]), "nobody"),
        (change(assistant_side=[]), "assistant_side"),
        (change(archetypes={}), "archetypes"),
        (change(archetypes={"ghost": {"group": "spirits", "words": ["grave"]}}), "archetype ghost is of group spirits"),
        (change(archetypes={"ghost": {"group": "mystical", "words": []}}), "archetypes.ghost.words"),
        (change(archetypes={"ghost": {"group": "mystical", "words": ["Grave"]}}), "'Grave' is not a lower-case word"),
        (change(groups={**CONTENT["groups"], "mystical": ["full moon"]}), "'full moon'"),
    ],
)
def test_every_defect_names_file_and_entry(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "lexicon.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        Lexicon.load(path)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: cannot be read"):
        Lexicon.load(tmp_path / "absent.json")
