"""Copies, whole and in part. The source of most tests has grown: two plans, two sets of layers, refused rows, scores, results, a state."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.errors import InputError, IntegrityError
from persona_ray.report.stores import copied_json, copied_lines
from persona_ray.spec import CapturedUnit, FinishReason, Judgement, Rollout, RowKey
from persona_ray.store.copy import copy_store
from persona_ray.store.finish import finish_store
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.metadata import settle
from persona_ray.store.plans import read_plans
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from persona_ray.store.reduced import publish_reduced, write_note, write_reduced
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter
from tests.store.test_reduced import a_result

Tree = Callable[[Path], dict[str, bytes]]
SECOND_SET = (1,)


def rollout_of(row: int, key: RowKey) -> Rollout:
    size = 2 + row % 3
    return Rollout(row, key, "", f"Question {key.question}?", "Aye.", np.arange(9 + size, dtype=np.int32), 2, 3 + size, FinishReason.STOP)


def commit(url: str, unit: int, *, refused: dict[int, str] | None = None, layers: tuple[int, ...] | None = None, seed: int = 0) -> None:
    plans = read_plans(FolderBackend(Path(url)))
    writer = UnitWriter(url, layers)
    wanted = tuple(rollout_of(row, key) for row, key in zip(plans.rows(unit), plans.keys(unit), strict=True))
    rollouts = writer.read_rollouts(unit) or writer.write_rollouts(unit, wanted)
    shape = (len(rollouts), len(layers or plans.layer_sets[0]), plans.hidden_size)
    values = np.random.default_rng([seed, unit, len(layers or ())]).normal(size=shape).astype(np.float32)
    for row in refused or {}:
        values[row - unit * plans.unit_rows] = np.nan
    writer.commit(CapturedUnit(unit, rollouts, values, refused or {}, {"hardware": "cpu", "seconds": {"capture": 1.0}, "tokens": 9}))


def grow(url: str, toy: Any) -> None:
    """A second plan with two more units."""
    keys = tuple(RowKey("jester", 0, question, turn=1) for question in range(6))
    plan = replace(toy.plan, archetypes=("jester",), default_archetypes=(), keys=keys)
    prepare_store(url, identity=toy.identity(), plan=plan, job={"name": "more"})


def score(url: str, judge: str, unit: int) -> None:
    (rollouts,) = open_store(url).rollouts([unit])
    judgements = [Judgement(rollout.index // 3 % 4, f"row {rollout.index}") for rollout in rollouts]
    ScoreWriter(url, judge, {"of": judge}).write(unit, rollouts, judgements)


@pytest.fixture
def grown(tmp_path: Path, toy: Any) -> str:
    url = str(tmp_path / "source")
    toy.prepare(url)
    commit(url, 0)
    commit(url, 1, refused={5: "too long"})
    grow(url, toy)
    plans = prepare_store(url, identity=toy.identity(), plan=toy.plan, job={"name": "layers"}, layers=SECOND_SET)
    last = plans.units[-1]
    commit(url, last, refused={plans.rows(last).start: "empty answer"})
    commit(url, 0, layers=SECOND_SET, refused={2: "out of memory"})
    for unit in (0, 1):
        score(url, "one", unit)
    score(url, "two", 0)
    publish_scores(url, "one")
    write_reduced(url, a_result(ledger_digest=open_store(url).snapshot().digest))
    write_note(url, "r-1", "steering", {"is": "a note"})
    publish_reduced(url, "r-1")
    open_store(url).cite()
    finish_store(url)
    assert verify(url).is_right
    # What must stay behind: text and numbers without a marker.
    UnitWriter(url).write_rollouts(2, tuple(rollout_of(row, key) for row, key in zip(plans.rows(2), plans.keys(2), strict=True)))
    return url


def kept(files: dict[str, bytes]) -> dict[str, bytes]:
    return {key: data for key, data in files.items() if not key.startswith("rollouts/part-000002")}


def test_a_copy_is_the_same_store_byte_by_byte_without_what_never_committed(grown: str, tmp_path: Path, tree: Tree) -> None:
    told: list[int] = []
    target = tmp_path / "target"
    copied = copy_store(grown, str(target), progress=told.append)
    assert (copied.units, copied.rows, copied.already_there, copied.left_out, copied.flaws) == (3, 10, 0, 0, ())
    assert told == [1, 1, 1]
    assert tree(target) == kept(tree(Path(grown)))
    assert "rollouts/part-000002.parquet" in tree(Path(grown))
    assert verify(str(target)).is_right
    assert open_store(str(target)).snapshot() == open_store(grown).snapshot()
    assert "nothing is wrong" in copied_lines(copied)
    assert json.loads(json.dumps(copied_json(copied)))["is_right"] is True


def test_again_copies_what_has_come_since(grown: str, tmp_path: Path, toy: Any, tree: Tree) -> None:
    target = tmp_path / "target"
    copy_store(grown, str(target))
    before = tree(target)
    again = copy_store(grown, str(target))
    assert (again.units, again.already_there, again.num_bytes) == (0, 3, before_views(before))
    assert tree(target) == before
    score(grown, "two", 1)
    publish_scores(grown, "two")
    commit(grown, 1, layers=SECOND_SET)
    commit(grown, 2)
    prepare_store(grown, identity=toy.identity(), plan=replace(toy.plan, keys=(RowKey("sage", 9, 9),)), job={})
    open_store(grown).cite()
    finish_store(grown)
    assert copy_store(grown, str(target)).units == 1
    assert tree(target) == tree(Path(grown))


def before_views(files: dict[str, bytes]) -> int:
    """Kept states are compared each time."""
    return sum(len(data) for key, data in files.items() if key.startswith("_views/"))


@pytest.mark.parametrize("allowed", [1, 2, 5, 9, 17, 25, 33])
def test_interrupted_anywhere_it_goes_on(grown: str, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch, allowed: int) -> None:
    target, count = tmp_path / "target", [0]
    create = FolderBackend.create_once

    def fragile(self: FolderBackend, key: str, data: bytes) -> Any:
        if self.root == target:
            count[0] += 1
            if count[0] > allowed:
                raise KeyboardInterrupt
        return create(self, key, data)

    monkeypatch.setattr(FolderBackend, "create_once", fragile)
    with pytest.raises(KeyboardInterrupt):
        copy_store(grown, str(target), workers=1)
    monkeypatch.setattr(FolderBackend, "create_once", create)
    assert copy_store(grown, str(target)).is_right
    assert tree(target) == kept(tree(Path(grown)))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("activations/c/1/0/0", "SHA-256"),
        ("rollouts/part-000001.parquet", "SHA-256"),
        ("status/c/1", "SHA-256"),
        ("_commits/000001.json", "cannot be read"),
    ],
)
def test_a_flipped_byte_is_named_and_nothing_of_its_unit_is_copied(grown: str, tmp_path: Path, tree: Tree, key: str, kind: str) -> None:
    path, target = Path(grown) / key, tmp_path / "target"
    data = bytearray(path.read_bytes())
    data[0 if key.startswith("_") else len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    copied = copy_store(grown, str(target))
    assert (copied.units, copied.is_right) == (2, False)
    assert [(flaw.key, kind in flaw.problem) for flaw in copied.flaws] == [(key, True)]
    assert key in copied_lines(copied)
    assert Ledger(str(target)).committed() == Ledger(grown).committed() - {1}
    own = (
        "activations/c/1/0/0",
        "rollouts/part-000001.parquet",
        "status/c/1",
        "committed/c/1",
        "_commits/000001.json",
        "scores/one/score/c/1",
    )
    assert tree(target).keys().isdisjoint(own)
    assert verify(str(target)).is_right


def test_damaged_scores_results_and_objects_that_are_gone_are_named(grown: str, tmp_path: Path, tree: Tree) -> None:
    source, target = Path(grown), tmp_path / "target"
    (source / "scores/one/score/c/1").write_bytes((source / "scores/one/score/c/0").read_bytes())
    (source / "reduced/r-1/axis/c/0/0").write_bytes(b"nothing")
    (source / "activations_1/c/0/0/0").unlink()
    copied = copy_store(grown, str(target))
    named = {flaw.key for flaw in copied.flaws}
    assert named == {"reduced/r-1", "activations_1/c/0/0/0", "scores/one/score/c/1"}
    assert not any(key.startswith(("reduced/r-1", "activations_1/c")) for key in tree(target))
    assert verify(str(target)).is_right


def test_scores_that_are_not_their_answers_are_named(grown: str, tmp_path: Path, tree: Tree) -> None:
    source, target = Path(grown), tmp_path / "target"
    (source / "scores/one/score/c/1").write_bytes((source / "scores/two/score/c/0").read_bytes()[:-1] + b"?")
    (source / "scores/two/raw/part-000000.parquet").write_bytes((source / "scores/two/raw/part-000000.parquet").read_bytes()[:-9])
    copied = copy_store(grown, str(target))
    assert [flaw.key for flaw in copied.flaws] == ["scores/two/raw/part-000000.parquet", "scores/one/score/c/1"]
    assert not {flaw.key for flaw in copied.flaws} & tree(target).keys()


def test_another_store_or_anything_else_is_refused_and_left_alone(grown: str, tmp_path: Path, toy: Any, make_toy: Any, tree: Tree) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("today")
    make_toy(rows=7).fill(tmp_path / "other")
    ahead = tmp_path / "ahead"
    copy_store(grown, str(ahead))
    commit(str(ahead), 2)
    same_plan = tmp_path / "same"
    copy_store(grown, str(same_plan))
    (same_plan / "_commits/000001.json").write_bytes((same_plan / "_commits/000001.json").read_bytes() + b" ")
    cases = [("notes", "not empty"), ("other", "another store"), ("ahead", "gone on by itself"), ("same", "gone on by itself")]
    for name, words in cases:
        before = tree(tmp_path / name)
        with pytest.raises(InputError, match=words):
            copy_store(grown, str(tmp_path / name))
        assert tree(tmp_path / name) == before
    for name in ("other", "ahead"):
        before = tree(tmp_path / name)
        with pytest.raises(InputError, match="no part of another store"):
            copy_store(grown, str(tmp_path / name), archetypes=["bard"])
        assert tree(tmp_path / name) == before
    for place in (grown, f"{grown}/inside", str(tmp_path)):
        with pytest.raises(InputError, match="give another place"):
            copy_store(grown, place)
    with pytest.raises(InputError, match="no persona_ray store"):
        copy_store(str(tmp_path / "nowhere"), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_other_bytes_under_a_name_are_never_overwritten(grown: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    copy_store(grown, str(target))
    for key in ("_commits/000000.json", "_commits_1/000000.json"):
        (target / key).unlink()
    (target / "status/c/0").write_bytes(b"other")
    with pytest.raises(IntegrityError, match="status/c/0 is there already"):
        copy_store(grown, str(target))
    assert (target / "status/c/0").read_bytes() == b"other"


def test_a_plan_in_doubt_is_not_copied(grown: str, tmp_path: Path) -> None:
    path = Path(grown) / "_plans/000000.json"
    path.write_bytes(path.read_bytes().replace(b'"question": [0, 0', b'"question": [0, 5'))
    with pytest.raises(IntegrityError, match="_plans"):
        copy_store(grown, str(tmp_path / "target"))
    assert not (tmp_path / "target").exists()


def test_a_state_is_copied_with_its_own_results_and_can_be_cited_there(grown: str, tmp_path: Path) -> None:
    digest = open_store(grown).snapshot().digest
    commit(grown, 2)
    write_reduced(grown, a_result("r-2", ledger_digest=open_store(grown).snapshot().digest))
    publish_reduced(grown, "r-2")
    target = str(tmp_path / "target")
    copied = copy_store(grown, target, at=digest)
    assert (copied.units, copied.is_right) == (3, True)
    there = open_store(target, at=digest)
    assert there.snapshot().digest == open_store(target).snapshot().digest == digest
    assert there.reduced("r-1").name == "r-1"
    assert there.latest_reduced() is None
    with pytest.raises(InputError, match="no result"):
        there.reduced("r-2")
    assert copy_store(grown, target).units == 1
    assert open_store(target).latest_reduced() == "r-2"


# ---- a part -----------------------------------------------------------------------------------------------------------


def by_key(url: str, layers: tuple[int, ...], *, judge: str | None = "one", **wanted: Any) -> dict[RowKey, tuple[bytes, Rollout, int]]:
    rows = open_store(url).select(layers=layers, **wanted)
    values, scores = rows.activations(), rows.scores(judge) if judge else np.zeros(len(rows))
    return {
        text.key: (values[i].tobytes(), replace(text, index=0, token_ids=text.token_ids.tobytes()), int(scores[i]))
        for i, text in enumerate(rows.rollouts())
    }


def test_some_archetypes_as_a_store_of_their_own(grown: str, tmp_path: Path) -> None:
    target = str(tmp_path / "part")
    copied = copy_store(grown, target, layers=[3], archetypes=["sage", "default"])
    assert copied.is_right
    wanted = by_key(grown, (3,), archetype=["sage", "default"])
    assert by_key(target, (3,)) == wanted
    there = open_store(target)
    assert (there.layers, there.archetypes, there.default_archetypes) == ((3,), ("default", "sage"), ("default",))
    assert [key for unit in there.plans.units for key in there.plans.keys(unit)] == [
        key for unit in (0, 1) for key in read_plans(FolderBackend(Path(grown))).keys(unit) if key.archetype != "bard"
    ]
    assert there.counts().reasons == {"too long": 1}
    assert copied.left_out == 2
    assert there.job["origin"] == {
        "url": grown,
        "ledger_digest": open_store(grown).snapshot().digest,
        "layers": [3],
        "archetypes": ["default", "sage"],
    }
    assert there.latest_scores() == "one"
    assert there.scored_units("one") == set(there.plans.units)
    made = there.ledger.markers()[0].made
    assert made == {"hardware": "cpu", "copied_from": [0, 1]}
    assert verify(target).is_right


def test_layers_of_several_sets_become_one(grown: str, tmp_path: Path) -> None:
    target = str(tmp_path / "part")
    copied = copy_store(grown, target, layers=[1, 0])
    assert (copied.rows, copied.left_out) == (4, 12)
    there = open_store(target)
    assert there.plans.layer_sets == ((0, 1),)
    assert by_key(target, (0, 1)) == by_key(grown, (0, 1))
    assert there.counts().reasons == {"out of memory": 1}
    assert copied.is_right


def test_a_part_grows_with_its_source(grown: str, tmp_path: Path, tree: Tree) -> None:
    target = tmp_path / "part"
    first = copy_store(grown, str(target), archetypes=["sage", "jester"], layers=[0, 3])
    before = tree(target)
    again = copy_store(grown, str(target), archetypes=["sage", "jester"], layers=[0, 3])
    assert (again.units, again.already_there, again.is_right) == (0, first.units, True)
    assert tree(target) == before
    commit(grown, 2)
    more = copy_store(grown, str(target), archetypes=["sage", "jester"], layers=[0, 3])
    assert (more.units, more.already_there, more.is_right) == (1, first.units, True)
    assert by_key(str(target), (0, 3), judge=None) == by_key(grown, (0, 3), judge=None, archetype=["sage", "jester"])
    assert copy_store(grown, str(target), archetypes=["bard"], layers=[0, 3]).is_right
    assert by_key(str(target), (0, 3), judge=None) == by_key(grown, (0, 3), judge=None, archetype=["sage", "jester", "bard"])


def test_an_interrupted_part_goes_on(grown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, done = str(tmp_path / "part"), UnitWriter.commit

    def fragile(self: UnitWriter, captured: CapturedUnit) -> None:
        if captured.index == 1:
            raise KeyboardInterrupt
        done(self, captured)

    monkeypatch.setattr(UnitWriter, "commit", fragile)
    with pytest.raises(KeyboardInterrupt):
        copy_store(grown, target, layers=[0], workers=1)
    monkeypatch.setattr(UnitWriter, "commit", done)
    assert 1 not in Ledger(target).committed()
    # Another selection than the one that was planned: its units are done, too.
    copied = copy_store(grown, target, layers=[0], archetypes=["bard"])
    assert copied.is_right
    assert 1 <= copied.units == 3 - copied.already_there
    assert by_key(target, (0,)) == by_key(grown, (0,))


@pytest.mark.parametrize("key", ["activations/c/1/0/0", "rollouts/part-000001.parquet", "_commits/000001.json"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_damage_is_named_and_only_units_made_from_it_are_left_out(grown: str, tmp_path: Path, key: str, is_gone: bool) -> None:
    path, target = Path(grown) / key, str(tmp_path / "part")
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[0 if key.startswith("_") else len(data) // 2 if key.endswith("parquet") else 20] ^= 1
    path.write_bytes(bytes(damaged))
    if is_gone and not key.startswith("_"):
        path.unlink()
    copied = copy_store(grown, target, layers=[0, 3])
    assert not copied.is_right
    assert any(key == flaw.key or "000001" in flaw.problem for flaw in copied.flaws)
    assert Ledger(target).committed() == {0, 2}
    assert verify(target).is_right
    path.write_bytes(data)
    assert copy_store(grown, target, layers=[0, 3]).units == 1
    assert by_key(target, (0, 3)) == by_key(grown, (0, 3))


def test_what_cannot_be_picked(grown: str, tmp_path: Path) -> None:
    target = tmp_path / "part"
    for wanted, words in (
        ({"layers": [7]}, "layers \\[7\\] were not captured"),
        ({"archetypes": ["nobody"]}, "no archetype nobody"),
        ({"archetypes": []}, "no archetype was named"),
        ({"layers": [1], "archetypes": ["jester"]}, "nothing to copy"),
        ({"at": "0" * 64}, "no state"),
    ):
        with pytest.raises(InputError, match=words):
            copy_store(grown, str(target), **wanted)
    assert not target.exists()
    settle(FolderBackend(Path(grown)))
