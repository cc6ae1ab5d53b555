from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Judgement
from persona_ray.store.finish import finish_store
from persona_ray.store.folder import FolderBackend
from persona_ray.store.ledger import Ledger
from persona_ray.store.marker import Marker
from persona_ray.store.repair import gc, place_of_object, requeue, restore
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.verify import verify
from persona_ray.store.writer import UnitWriter

UNIT = 1
TEXT = f"rollouts/part-{UNIT:06d}.parquet"
OWN = (TEXT, f"activations/c/{UNIT}/0/0", f"response_tokens/c/{UNIT}", f"finish_reason/c/{UNIT}", f"status/c/{UNIT}")
MASK = f"committed/c/{UNIT}"
SCORES = f"scores/judge-1/score/c/{UNIT}"
RAW = f"scores/judge-1/raw/part-{UNIT:06d}.parquet"
MARKER = f"_commits/{UNIT:06d}.json"
REFUSED = {5: "empty answer"}
DAY_S = 86_400


def work(folder: Path, toy: Any) -> str:
    """What a run does: units without a marker, from the text that is there; scores that are missing; the end."""
    url = str(toy.prepare(folder))
    writer, ledger = UnitWriter(url), Ledger(url)
    scores = ScoreWriter(url, "judge-1", {"backend": "toy"})
    for unit in toy.plan.units:
        if unit not in ledger.committed():
            text = writer.read_rollouts(unit) or writer.write_rollouts(unit, toy.rollouts(unit))
            writer.commit(toy.captured(unit, rollouts=text, refused={row: why for row, why in REFUSED.items() if row // 4 == unit}))
        if not (folder / f"scores/judge-1/score/c/{unit}").exists():
            scores.write(unit, toy.rollouts(unit), [Judgement(rollout.index % 4, "because") for rollout in toy.rollouts(unit)])
    publish_scores(url, "judge-1")
    finish_store(url)
    return url


def data_of(tree: dict[str, bytes]) -> dict[str, bytes]:
    """Everything but when it was made: markers without their dates, no quarantine."""
    kept = {key: data for key, data in tree.items() if not key.startswith("_quarantine/")}
    return {key: repr(Marker.from_bytes(data, key).objects).encode() if key.startswith("_commits/") else data for key, data in kept.items()}


def spoil(folder: Path, key: str, how: str = "flip", at: int = 10**9) -> None:
    data = (folder / key).read_bytes()
    at = min(at, len(data) - 1)
    if how == "delete":
        (folder / key).unlink()
    else:
        (folder / key).write_bytes(data[:at] if how == "cut" else data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_units_that_are_right_are_never_touched(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    before = tree(tmp_path)
    assert [done.deleted for done in requeue(url, toy.plan.units)] == [(), (), ()]
    assert tree(tmp_path) == before


def test_a_unit_that_the_plan_does_not_have_is_refused(tmp_path: Path, toy: Any) -> None:
    with pytest.raises(InputError, match=r"units \[3, 7\] are in no plan; there are 3 units"):
        requeue(work(tmp_path, toy), [0, 7, 3])


@pytest.mark.parametrize(
    ("key", "gone"),
    [
        (TEXT, (MARKER, MASK, SCORES, RAW, *reversed(OWN))),
        (OWN[1], (MARKER, MASK, *reversed(OWN[1:]))),
        (OWN[4], (MARKER, MASK, OWN[4])),
        (MARKER, (MARKER, MASK)),
        (MASK, (MASK,)),
        (SCORES, (SCORES,)),
        (RAW, (SCORES, RAW)),
    ],
    ids=["text", "activations", "status", "marker", "mask", "scores", "answers"],
)
def test_what_is_wrong_goes_with_what_was_made_from_it_and_nothing_else(
    tmp_path: Path, toy: Any, tree: Any, key: str, gone: tuple[str, ...]
) -> None:
    url = work(tmp_path, toy)
    whole = tree(tmp_path)
    spoil(tmp_path, key)
    spoiled = tree(tmp_path)
    (done,) = requeue(url, [UNIT])
    assert done.deleted == gone
    assert done.is_redone == (MARKER in gone)
    assert done.keeps_text == (key != TEXT)
    left = tree(tmp_path)
    assert {name: data for name, data in left.items() if not name.startswith("_quarantine/")} == {
        name: data for name, data in spoiled.items() if name not in gone
    }
    quarantined = [data for name, data in left.items() if name.endswith("/marker.json")]
    assert quarantined == ([spoiled[MARKER]] if MARKER in gone else [])
    assert verify(url).is_right
    work(tmp_path, toy)
    assert verify(url).is_right
    assert data_of(tree(tmp_path)) == data_of(whole)


def test_an_object_that_is_gone_is_made_again_from_the_text(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    whole = tree(tmp_path)
    (tmp_path / OWN[1]).unlink()
    (done,) = requeue(url, [UNIT])
    assert done.keeps_text
    assert OWN[1] not in done.deleted
    work(tmp_path, toy)
    assert data_of(tree(tmp_path)) == data_of(whole)


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("key", [TEXT, OWN[1], OWN[3]])
@pytest.mark.parametrize("how", ["flip", "delete"])
def test_killed_at_any_point_it_can_be_repeated(
    tmp_path: Path, toy: Any, tree: Any, monkeypatch: pytest.MonkeyPatch, key: str, how: str
) -> None:
    work(tmp_path / "whole", toy)
    whole = data_of(tree(tmp_path / "whole"))
    num_steps = 0
    while True:
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(num_steps))
        spoil(folder, key, how)
        allowed = iter(range(num_steps))

        def step(act: Any, allowed: Any = allowed) -> Any:
            def acting(*arguments: Any) -> Any:
                if next(allowed, None) is None:
                    raise Killed
                return act(*arguments)

            return acting

        was_killed = False
        with monkeypatch.context() as patch:
            patch.setattr(FolderBackend, "delete", step(FolderBackend.delete))
            patch.setattr(FolderBackend, "create_once", step(FolderBackend.create_once))
            try:
                requeue(str(folder), [UNIT])
            except Killed:
                was_killed = True
        if how == "flip" and (folder / key).exists():
            assert not verify(str(folder)).is_right
        requeue(str(folder), [UNIT])
        assert verify(str(folder)).is_right
        work(folder, toy)
        assert verify(str(folder)).is_right
        assert data_of(tree(folder)) == whole
        if not was_killed:
            break
        num_steps += 1
    assert num_steps >= 4


def test_damage_that_only_the_marker_knew_is_known_after_it_is_gone(tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another text that reads well: an interrupted requeue must not leave it to the next run as if it were right."""
    url = work(tmp_path, toy)
    other = shutil.copytree(tmp_path, tmp_path.parent / "other")
    (tmp_path / TEXT).unlink()
    for key in (*OWN[1:], MASK, MARKER):
        (other / key).unlink()
    (other / TEXT).unlink()
    UnitWriter(str(other)).write_rollouts(UNIT, toy.rollouts(UNIT, said="Nay."))
    shutil.copy(other / TEXT, tmp_path / TEXT)
    delete = FolderBackend.delete

    def marker_alone(self: FolderBackend, key: str) -> None:
        if key != MARKER:
            raise Killed
        delete(self, key)

    with monkeypatch.context() as patch, pytest.raises(Killed):  # noqa: PT012
        patch.setattr(FolderBackend, "delete", marker_alone)
        requeue(url, [UNIT])
    assert not (tmp_path / MARKER).exists()
    found = verify(url)
    assert any(flaw.key == TEXT and "interrupted" in flaw.problem for flaw in found.units[UNIT].flaws)
    (done,) = requeue(url, [UNIT])
    assert not done.keeps_text
    assert not (tmp_path / TEXT).exists()


def test_a_damaged_quarantine_is_said_in_one_line(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    spoil(tmp_path, OWN[1])
    requeue(url, [UNIT])
    (key,) = (key for key in tree(tmp_path) if key.endswith("/condemned.json"))
    (tmp_path / key).write_bytes(b"[]")
    with pytest.raises(IntegrityError, match=r"condemned\.json: damaged .*requeue the unit again after deleting this object"):
        verify(url)


def test_nothing_is_requeued_by_a_plan_that_is_in_doubt(tmp_path: Path, toy: Any, tree: Any) -> None:
    """By a damaged plan every unit would look wrong."""
    url = work(tmp_path, toy)
    file = tmp_path / "_plans/000000.json"
    file.write_text(file.read_text().replace('"sample": [0, 1', '"sample": [0, 2'))
    before = tree(tmp_path)
    assert verify(url).wrong_units
    for repair in (lambda: requeue(url, toy.plan.units), lambda: restore(url)):
        with pytest.raises(IntegrityError, match=r"nothing was touched.*plan_digest"):
            repair()
    (tmp_path / "zarr.json").unlink()
    with pytest.raises(IntegrityError, match=r"nothing was touched.*sample/c/0"):
        requeue(url, toy.plan.units)
    assert tree(tmp_path) == {key: data for key, data in before.items() if key != "zarr.json"}


@pytest.mark.parametrize("how", ["flip", "cut", "delete"])
@pytest.mark.parametrize("key", ["archetype/c/0", "layer/c/0", "activations/zarr.json", "zarr.json"])
def test_what_follows_from_the_plan_is_written_anew(tmp_path: Path, toy: Any, tree: Any, key: str, how: str) -> None:
    url = work(tmp_path, toy)
    whole = tree(tmp_path)
    assert restore(url) == ()
    spoil(tmp_path, key, how, at=0 if how == "flip" else 40)
    assert key in restore(url)
    assert verify(url).is_right
    assert tree(tmp_path) == whole


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_was_damaged_a_requeue_and_a_run_bring_the_same_store_back(whole: Path, make_toy: Any, data: st.DataObject) -> None:
    toy = make_toy()
    units = data.draw(st.lists(st.sampled_from(range(3)), min_size=1, max_size=2, unique=True))
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(whole, Path(place) / "store")
        for unit in units:
            keys = [key for key in tree_of(whole) if place_of_object(key) == (0, unit) and "/raw/" not in key]
            for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True)):
                spoil(folder, key, data.draw(st.sampled_from(["flip", "cut", "delete"])), data.draw(st.integers(0, 300)))
        wrong = verify(str(folder)).wrong_units
        assert set(wrong) <= set(units)
        requeue(str(folder), wrong)
        assert verify(str(folder)).is_right
        work(folder, toy)
        assert verify(str(folder)).is_right
        assert data_of(tree_of(folder)) == data_of(tree_of(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_toy: Any) -> Path:
    """A store that nobody changes."""
    folder = tmp_path_factory.mktemp("whole")
    work(folder, make_toy())
    return folder


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- gc


def later() -> float:
    """Two days from now."""
    return time.time() + 2 * DAY_S


def test_a_whole_store_has_no_leftovers(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    before = tree(tmp_path)
    found = gc(url, delete=True, texts=True, clock=later)
    assert (found.leftovers, found.kept) == ((), ())
    assert tree(tmp_path) == before


def abandoned(folder: Path, toy: Any) -> tuple[str, set[str]]:
    """A store whose unit 1 died just before its marker; answers URL and what is left of it."""
    url = work(folder, toy)
    for key in (MARKER, MASK):
        (folder / key).unlink()
    return url, {*OWN, SCORES, RAW}


def test_numbers_of_a_unit_without_a_marker_are_listed_and_go_only_if_told_and_its_text_stays(tmp_path: Path, toy: Any, tree: Any) -> None:
    url, _ = abandoned(tmp_path, toy)
    before = tree(tmp_path)
    found = gc(url, delete=False, clock=later)
    assert {leftover.key for leftover in found.leftovers} == set(OWN[1:])
    assert {leftover.why for leftover in found.leftovers} == {"unit 000001 has no marker"}
    assert sum(leftover.num_bytes for leftover in found.leftovers) == sum(len(before[key]) for key in OWN[1:])
    assert "text and scores of units without a marker (3 in number)" in found.kept[0]
    assert tree(tmp_path) == before
    assert gc(url, delete=True, clock=later).is_deleted
    assert tree(tmp_path) == {key: data for key, data in before.items() if key not in OWN[1:]}
    assert verify(url).is_right


def test_text_goes_only_if_asked(tmp_path: Path, toy: Any, tree: Any) -> None:
    url, left = abandoned(tmp_path, toy)
    before = tree(tmp_path)
    gc(url, delete=True, texts=True, clock=later)
    assert tree(tmp_path) == {key: data for key, data in before.items() if key not in left}


def test_nothing_of_a_run_that_may_be_at_work_is_taken(tmp_path: Path, toy: Any, tree: Any) -> None:
    url, _ = abandoned(tmp_path, toy)
    before = tree(tmp_path)
    old = time.time() - 2 * DAY_S
    for key in OWN:
        os.utime(tmp_path / key, (old, old))
    found = gc(url, delete=True)
    assert found.leftovers == ()
    assert "perhaps by a run" in found.kept[1]
    assert tree(tmp_path) == before
    assert gc(url, delete=True, min_age_s=0).leftovers


def test_a_unit_that_is_committed_meanwhile_keeps_everything(tmp_path: Path, toy: Any, tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, _ = abandoned(tmp_path, toy)
    listing = FolderBackend.list_objects

    def list_then_commit(self: FolderBackend, folder: str) -> Any:
        found = listing(self, folder)
        work(tmp_path, toy)
        return found

    monkeypatch.setattr(FolderBackend, "list_objects", list_then_commit)
    gc(url, delete=True, texts=True, clock=later)
    assert verify(url).is_right
    assert Ledger(url).committed() == {0, 1, 2}


def test_a_damaged_or_unknown_marker_protects_its_unit_too(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    (tmp_path / MARKER).write_bytes(b"")
    (tmp_path / "_commits/000009.json").write_bytes(b"{}")
    (tmp_path / "status/c/9").write_bytes(b"x")
    (tmp_path / "status/c/8").write_bytes(b"x")
    before = tree(tmp_path)
    gc(url, delete=True, texts=True, clock=later)
    assert before.keys() - tree(tmp_path).keys() == {"status/c/8"}


def test_the_quarantine_goes_once_its_unit_is_there_again(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = work(tmp_path, toy)
    spoil(tmp_path, OWN[1])
    requeue(url, [UNIT])
    kept = [key for key in tree(tmp_path) if key.startswith("_quarantine/")]
    assert len(kept) == 2
    assert not any(leftover.key in kept for leftover in gc(url, delete=True, min_age_s=0).leftovers)
    work(tmp_path, toy)
    assert gc(url, delete=True).leftovers == ()
    assert {leftover.key for leftover in gc(url, delete=True, clock=later).leftovers} == set(kept)
    assert not any(key.startswith("_quarantine/") for key in tree(tmp_path))


def test_half_made_files_go_when_they_are_old(tmp_path: Path, toy: Any) -> None:
    url = work(tmp_path, toy)
    half = tmp_path / "_tmp/0123"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"half")
    assert gc(url, delete=True).leftovers == ()
    assert half.exists()
    (leftover,) = gc(url, delete=True, clock=later).leftovers
    assert (leftover.key, leftover.num_bytes, leftover.why) == ("_tmp/0123", 4, "half-made temporary file")
    assert not half.exists()
    assert verify(url).is_right


def test_deleting_is_no_fault_where_nothing_is(tmp_path: Path) -> None:
    backend = FolderBackend(tmp_path)
    backend.create_once("a/b", b"123")
    (listed,) = backend.list_objects("")
    assert (listed.key, listed.num_bytes) == ("a/b", 3)
    assert abs(listed.modified_s - time.time()) < DAY_S
    for _ in range(2):
        backend.delete("a/b")
        assert backend.list_objects("") == []
