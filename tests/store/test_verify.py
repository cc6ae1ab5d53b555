from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persona_ray.errors import InputError, IntegrityError
from persona_ray.spec import Judgement, Reduced
from persona_ray.store.encoding import encode_unit
from persona_ray.store.finish import finish_store
from persona_ray.store.folder import FolderBackend
from persona_ray.store.layout import unit_arrays
from persona_ray.store.marker import Marker
from persona_ray.store.plans import Plans, read_plans
from persona_ray.store.reduced import publish_reduced, write_reduced
from persona_ray.store.scores import ScoreWriter, publish_scores
from persona_ray.store.survey import State
from persona_ray.store.text import encode_rollouts
from persona_ray.store.verify import Verification, verify

UNIT = 1
OWN = (
    f"rollouts/part-{UNIT:06d}.parquet",
    f"activations/c/{UNIT}/0/0",
    f"response_tokens/c/{UNIT}",
    f"finish_reason/c/{UNIT}",
    f"status/c/{UNIT}",
)
MASK = f"committed/c/{UNIT}"
SCORES = f"scores/judge-1/score/c/{UNIT}"
RAW = f"scores/judge-1/raw/part-{UNIT:06d}.parquet"
MARKER = f"_commits/{UNIT:06d}.json"
REFUSED = {5: "empty answer"}


def flip(data: bytes, place: int | None = None) -> bytes:
    """One bit, in the middle if not said otherwise."""
    place = len(data) // 2 if place is None else place
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "flipped": flip,
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "deleted": lambda data: None,
}


def spoil(folder: Path, key: str, how: str) -> None:
    data = DAMAGES[how]((folder / key).read_bytes())
    if data is None:
        (folder / key).unlink()
    else:
        (folder / key).write_bytes(data)


def filled(folder: Path, toy: Any, units: range | None = None) -> str:
    """A store with refused rows, scores and a result, as a run leaves it."""
    url = str(toy.fill(folder, units=units, refused=REFUSED))
    scores = ScoreWriter(url, "judge-1", {"backend": "toy"})
    for unit in toy.plan.units if units is None else units:
        rollouts = toy.rollouts(unit)
        scores.write(unit, rollouts, [Judgement(rollout.index % 4, "because") for rollout in rollouts])
    publish_scores(url, "judge-1")
    write_reduced(url, a_result())
    publish_reduced(url, "r-1")
    finish_store(url)
    return url


def a_result() -> Reduced:
    ones = np.ones((2, 6), np.float32)
    return Reduced(
        name="r-1",
        archetypes=("default", "bard", "sage"),
        layers=(0, 3),
        role_vector_ALD=np.ones((3, 2, 6), np.float32),
        role_count_A=np.array([4, 3, 3], dtype=np.int32),
        default_vector_LD=ones,
        axis_LD=ones,
        pca_components_LKD=np.ones((2, 1, 6), np.float32),
        pca_explained_variance_LK=ones[:, :1],
        pca_explained_variance_ratio_LK=ones[:, :1],
        cos_pc1_axis_L=ones[:, 0],
        attributes={"ledger_digest": "ab"},
    )


def flawed_keys(found: Verification) -> set[str]:
    return {flaw.key for report in found.units for flaw in report.flaws} | {flaw.key for flaw in found.flaws}


def problems(found: Verification) -> str:
    return "; ".join(f"{flaw.key}: {flaw.problem}" for flaw in (*found.flaws, *(flaw for report in found.units for flaw in report.flaws)))


def test_a_whole_store_is_right_and_its_refused_rows_are_listed(tmp_path: Path, toy: Any, tree: Any) -> None:
    url = filled(tmp_path, toy)
    before = tree(tmp_path)
    ticks: list[int] = []
    found = verify(url, progress=ticks.append)
    assert found.is_right, problems(found)
    assert found.notes == ()
    assert [report.state for report in found.units] == [State.OK] * 3
    assert [dict(report.refused) for report in found.units] == [{}, REFUSED, {}]
    assert sum(ticks) == found.num_units == 3
    assert tree(tmp_path) == before


def test_every_option_of_the_store_is_right(tmp_path: Path, make_toy: Any) -> None:
    for name, toy in {"float32": make_toy(store_dtype="float32"), "one unit": make_toy(rows=3), "full units": make_toy(rows=8)}.items():
        assert verify(toy.fill(tmp_path / name)).is_right, name


def test_a_store_that_grows_is_right(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy, range(1))
    found = verify(url)
    assert found.is_right
    assert found.counts == {State.OK: 1, State.CORRUPT: 0, State.MISSING: 0, State.NOT_WRITTEN: 2}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("key", OWN)
def test_an_object_of_a_unit_is_found_and_named(tmp_path: Path, toy: Any, key: str, how: str) -> None:
    url = filled(tmp_path, toy)
    spoil(tmp_path, key, how)
    found = verify(url)
    assert [report.state for report in found.units] == [State.OK, State.MISSING if how == "deleted" else State.CORRUPT, State.OK]
    assert flawed_keys(found) == {key}
    assert found.wrong_units == (UNIT,)
    (flaw,) = found.units[UNIT].flaws
    word = {"flipped": "SHA-256", "deleted": "gone"}.get(how, "size")
    assert word in flaw.problem


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "deleted"])
@pytest.mark.parametrize("key", [MASK, SCORES, RAW])
def test_mask_and_scores_are_found_and_named(tmp_path: Path, toy: Any, key: str, how: str) -> None:
    url = filled(tmp_path, toy)
    data = (tmp_path / key).read_bytes()
    spoil(tmp_path, key, how)
    if (key, how) == (RAW, "flipped"):
        (tmp_path / key).write_bytes(flip(data, len(data) - 1))
    found = verify(url)
    assert flawed_keys(found) == {key}
    assert found.wrong_units == (UNIT,)


def test_answers_that_are_gone_are_named_and_a_mask_behind_is_no_fault(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    (tmp_path / MASK).unlink()
    found = verify(url)
    assert found.is_right
    assert "mask behind" in found.units[UNIT].notes[0]
    (tmp_path / SCORES).unlink()
    assert verify(url).is_right
    (tmp_path / "scores/judge-1/raw/part-000002.parquet").unlink()
    assert flawed_keys(verify(url)) == {"scores/judge-1/raw/part-000002.parquet"}


def test_scores_that_differ_from_the_answers_are_named(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    (tmp_path / SCORES).write_bytes((tmp_path / "scores/judge-1/score/c/2").read_bytes())
    assert "differs from what the judge's answers make of rows 6, 7" in problems(verify(url))


def test_a_deleted_marker_is_a_unit_that_does_not_exist_and_said_to_be_whole(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    (tmp_path / MARKER).unlink()
    (tmp_path / MASK).unlink()
    found = verify(url)
    assert found.is_right
    assert found.units[UNIT].state is State.NOT_WRITTEN
    assert "all its objects are there" in found.units[UNIT].notes[0]


def test_a_mask_without_a_marker_is_a_lie(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    (tmp_path / MARKER).unlink()
    assert flawed_keys(verify(url)) == {MASK}


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied"])
def test_a_damaged_marker_is_found_and_named(tmp_path: Path, toy: Any, how: str) -> None:
    url = filled(tmp_path, toy)
    spoil(tmp_path, MARKER, how)
    found = verify(url)
    assert found.units[UNIT].state is State.CORRUPT
    assert found.wrong_units == (UNIT,)
    if how != "flipped":
        assert flawed_keys(found) == {MARKER}


def test_a_marker_of_another_unit_or_of_none_is_named(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    data = (tmp_path / MARKER).read_bytes()
    for name in ("000009.json", "notes.txt"):
        (tmp_path / "_commits" / name).write_bytes(data)
    (tmp_path / "_commits/000002.json").write_bytes(data)
    found = verify(url)
    assert flawed_keys(found) == {"_commits/000009.json", "_commits/notes.txt", "_commits/000002.json"}
    assert "unknown unit" in problems(found)
    assert "speaks of unit 1" in problems(found)


def rewritten(folder: Path, key: str, data: bytes) -> None:
    """`data` under `key`, and the marker says that it belongs there: damage before the digest was taken."""
    import hashlib

    marker = Marker.from_bytes((folder / MARKER).read_bytes(), "")
    record = replace(marker.objects[key], num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / MARKER).write_bytes(replace(marker, objects={**marker.objects, key: record}).to_bytes())
    (folder / key).write_bytes(data)


def plans_of(folder: Path) -> Plans:
    return read_plans(FolderBackend(folder))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (lambda v: np.where(np.arange(4)[:, None, None] == 0, np.nan, v), "NaN in stored rows 4"),
        (lambda v: np.nan_to_num(v, nan=1.0), "holds numbers in refused rows 5"),
        (lambda v: np.where(v == v[2, 1, 3], np.inf, v), "NaN or Inf among the numbers of rows 6"),
        (lambda v: np.where(v == v[2, 1, 3], np.nan, v), "NaN or Inf among the numbers of rows 6"),
        (lambda v: v + np.float32(1e-6), "not bfloat16-exact"),
    ],
    ids=["nan-in-stored", "numbers-in-refused", "inf", "one-nan", "not-exact"],
)
def test_numbers_that_contradict_the_marker_are_named_although_their_digest_is_right(
    tmp_path: Path, toy: Any, values: Callable[[np.ndarray], np.ndarray], complaint: str
) -> None:
    from persona_ray.store.encoding import decode_unit

    url = filled(tmp_path, toy)
    spec = unit_arrays(plans_of(tmp_path))["activations"]
    found_RLD = decode_unit(spec, (tmp_path / OWN[1]).read_bytes(), "")
    rewritten(tmp_path, OWN[1], encode_unit(spec, values(found_RLD).astype(np.float32)))
    found = verify(url)
    assert flawed_keys(found) == {OWN[1]}
    assert complaint in problems(found)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("status", [0, 0, 0, 0], "the refused rows make of rows 5"),
        ("finish_reason", [0, 1, 1, 1], "the text make"),
        ("response_tokens", [2, 0, 9, 2], "the text's spans make of rows 6"),
    ],
)
def test_columns_that_contradict_the_text_are_named(tmp_path: Path, toy: Any, name: str, values: list[int], complaint: str) -> None:
    url = filled(tmp_path, toy)
    spec = unit_arrays(plans_of(tmp_path))[name]
    rewritten(tmp_path, f"{name}/c/{UNIT}", encode_unit(spec, np.array(values, dtype=spec.dtype)))
    found = verify(url)
    assert flawed_keys(found) == {f"{name}/c/{UNIT}"}
    assert complaint in problems(found)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda text: text[1:], "not the plan's rows 4 to 7"),
        (lambda text: (replace(text[0], response_end=999), *text[1:]), "outside of the token ids in rows 4"),
        (lambda text: (*text[:3], replace(text[3], response_end=text[3].response_start)), "no token is pooled in rows 7"),
        (lambda text: (*text[:3], replace(text[3], refusal="no")), "refuses rows 7, and the marker does not"),
    ],
    ids=["rows", "span", "empty-span", "refusal"],
)
def test_text_that_contradicts_the_plan_is_named(tmp_path: Path, toy: Any, change: Callable[[Any], Any], complaint: str) -> None:
    url = filled(tmp_path, toy)
    rewritten(tmp_path, OWN[0], encode_rollouts(change(toy.rollouts(UNIT))))
    found = verify(url)
    assert flawed_keys(found) == {OWN[0]}
    assert complaint in problems(found)


def test_leftovers_without_a_marker_are_read_too(tmp_path: Path, toy: Any) -> None:
    """The next run would take them for its own."""
    url = filled(tmp_path, toy)
    for key in (MARKER, MASK):
        (tmp_path / key).unlink()
    spoil(tmp_path, OWN[4], "flipped")
    found = verify(url)
    assert found.units[UNIT].state is State.CORRUPT
    assert flawed_keys(found) == {OWN[4]}
    (tmp_path / OWN[0]).unlink()
    assert flawed_keys(verify(url)) == {*OWN[1:], RAW, SCORES}
    assert f"was made from {OWN[0]}, which is gone" in problems(verify(url))


PLANNED = (
    "rollout/c/0",
    "archetype/c/0",
    "question/c/0",
    "layer/c/0",
    "activations/zarr.json",
    "layer/zarr.json",
    "scores/judge-1/score/zarr.json",
)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("key", PLANNED)
def test_what_follows_from_the_plan_is_found_and_named(tmp_path: Path, toy: Any, key: str, how: str) -> None:
    url = filled(tmp_path, toy)
    spoil(tmp_path, key, how)
    found = verify(url)
    assert not found.is_right
    assert key in flawed_keys(found)
    assert found.wrong_units == ()


def test_a_digit_changed_in_metadata_is_named(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    root = json.loads((tmp_path / "zarr.json").read_text())
    root["consolidated_metadata"]["metadata"]["activations"]["shape"][0] = 8
    (tmp_path / "zarr.json").write_text(json.dumps(root))
    assert "its copy of activations/zarr.json differs" in problems(verify(url))
    for how in ("truncated", "emptied", "deleted"):
        (tmp_path / "zarr.json").write_text(json.dumps(root))
        spoil(tmp_path, "zarr.json", how)
        assert flawed_keys(verify(url)) == {"zarr.json"}


def test_a_changed_plan_file_is_found_by_the_root(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    file = tmp_path / "_plans/000000.json"
    text = file.read_text()
    file.write_text(text.replace('"seed": 0', '"seed": 8'))
    assert "identity, identity_digest disagree with _plans/" in problems(verify(url))
    file.write_text(text[:-9])
    with pytest.raises(IntegrityError, match=r"_plans/000000.json: damaged plan"):
        verify(url)
    file.unlink()
    with pytest.raises(InputError, match="no persona_ray store here"):
        verify(url)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_result_is_found_and_named(tmp_path: Path, toy: Any, how: str) -> None:
    url = filled(tmp_path, toy)
    spoil(tmp_path, "reduced/r-1/axis/c/0/0", how)
    found = verify(url)
    assert not found.is_right
    assert "reduced/r-1" in problems(found)
    assert "computes it again" in problems(found)
    assert found.wrong_units == ()


def test_a_pointer_to_nothing_is_named(tmp_path: Path, toy: Any) -> None:
    url = filled(tmp_path, toy)
    (tmp_path / "reduced/latest.json").write_text('{"name": "r-2"}')
    (tmp_path / "scores/latest.json").write_text("{")
    assert flawed_keys(verify(url)) == {"reduced/latest.json", "scores/latest.json"}


def test_metadata_that_are_behind_are_no_fault(tmp_path: Path, toy: Any) -> None:
    url = str(toy.fill(tmp_path))
    ScoreWriter(url, "judge-1", {}).write(0, toy.rollouts(0), [Judgement(1, "")] * 4)
    found = verify(url)
    assert found.is_right
    assert "metadata behind" in found.notes[0]


def test_a_sample_is_the_same_each_time_and_part_of_a_larger_one(tmp_path: Path, make_toy: Any) -> None:
    toy = make_toy(rows=80)
    url = toy.prepare(tmp_path)
    samples = [[report.unit for report in verify(url, sample=share).units] for share in (0.01, 0.25, 0.25, 0.5, 1.0)]
    assert [len(units) for units in samples] == [1, 5, 5, 10, 20]
    assert samples[1] == samples[2] != list(range(5))
    assert set(samples[0]) < set(samples[1]) < set(samples[3]) < set(samples[4])
    for share in (0, 1.5, -1, float("nan")):
        with pytest.raises(InputError, match="give a share"):
            verify(url, sample=share)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_toy: Any) -> Path:
    """A store that nobody changes."""
    folder = tmp_path_factory.mktemp("whole")
    filled(folder, make_toy())
    return folder


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_bit_of_any_object_that_a_marker_names(whole: Path, data: st.DataObject) -> None:
    """And of the mask, of the scores and of the planned columns, which carry check sums."""
    import shutil

    keys = [*OWN, MASK, SCORES, *(key for key in PLANNED if "/c/" in key)]
    chosen = data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3, unique=True))
    with tempfile.TemporaryDirectory() as place:
        folder = shutil.copytree(whole, Path(place) / "store")
        for key in chosen:
            bits = (folder / key).read_bytes()
            how = data.draw(st.sampled_from(["flip", "cut"]))
            at = data.draw(st.integers(0, len(bits) - 1))
            mask = 1 << data.draw(st.integers(0, 7))
            (folder / key).write_bytes(bits[:at] if how == "cut" else bits[:at] + bytes([bits[at] ^ mask]) + bits[at + 1 :])
        assert flawed_keys(verify(str(folder), workers=1)) == set(chosen)
