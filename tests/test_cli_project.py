"""`persona-ray project`, on stores whose archetypes have planted places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from persona_ray.spec import Judgement
from persona_ray.store.reader import open_store
from persona_ray.store.scores import ScoreWriter, publish_scores
from tests.planted import DEFAULT, PLACES, Planted
from tests.store.conftest import Toy, _impatient_disk, _tree  # noqa: F401
from tests.test_cli_results import call, document

ALL = {"default": DEFAULT, **PLACES}
COS_30 = float(np.cos(np.radians(30)))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        "one": Planted().reduced(folder / "one"),
        "relative": Planted(model="toy/base", turned_degrees=30).reduced(folder / "relative"),
        "wide": Planted(hidden=9).reduced(folder / "wide"),
        "bare": Toy(rows=12).fill(folder / "bare"),
    }


def archetypes(found: dict[str, Any], place: int = 0) -> dict[str, dict[str, Any]]:
    return {line["archetype"]: line for line in found["layers"][place]["archetypes"]}


def means(found: dict[str, Any], quantity: str = "projection", place: int = 0) -> dict[str, Any]:
    return {name: line[quantity] for name, line in archetypes(found, place).items()}


def test_rows_on_their_own_axis(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    found = document(capsys, "project", stores["one"])
    assert (found["rows"], [layer["layer"] for layer in found["layers"]], found["component"]) == (24, [3], None)
    # Layer 3 has everything times 4, and the default Assistant ends the axis.
    assert means(found) == pytest.approx({name: 4 * along for name, (along, _) in ALL.items()}, abs=1e-5)
    assert means(found, "position") == pytest.approx({name: along / 2 for name, (along, _) in ALL.items()}, abs=1e-6)
    assert set(means(found, "rows").values()) == {4}
    assert max(means(found, "spread").values()) == pytest.approx(0, abs=1e-5)
    assert [name for name, line in archetypes(found).items() if line["is_default"]] == ["default"]
    assert list(archetypes(found)) == ["default", "sage", "bard", "imp", "crone", "ghost"]
    assert [answer["answer"] for answer in found["layers"][0]["answers"]] == [1]
    assert (found["notes"], found["out"]) == ([], None)


def test_rows_on_the_axis_of_a_relative(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    name = open_store(stores["relative"]).latest_reduced()
    found = document(capsys, "project", stores["one"], "--axis", f"{stores['relative']}@{name}", "--layers", "0,3")
    assert [layer["layer"] for layer in found["layers"]] == [0, 3]
    for place, gain in enumerate((1, 4)):
        assert means(found, place=place) == pytest.approx({name: gain * along * COS_30 for name, (along, _) in ALL.items()}, abs=1e-5)
    assert means(found, "position", 1)["default"] == pytest.approx(COS_30, abs=1e-6)
    assert found["notes"] == ["the rows are of toy/model, what they are projected on of toy/base"]


def test_rows_on_a_component(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    found = document(capsys, "project", stores["one"], "--component", "2")
    assert means(found) == pytest.approx({name: 4 * across for name, (_, across) in ALL.items()}, abs=1e-5)
    assert set(means(found, "position").values()) == {None}


def test_an_axis_that_was_handed_around(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    ours, published = tmp_path / "ours", tmp_path / "published"
    document(capsys, "store", "export", stores["one"], ours, "--format", "safetensors")
    document(capsys, "store", "export", stores["one"], published, "--format", "published")
    own = document(capsys, "project", stores["one"])
    named = document(capsys, "project", stores["one"], "--axis", ours / "axis.safetensors")
    assert named["layers"] == own["layers"]
    assert (named["notes"], "the middle one" in named["recommended_because"]) == ([], True)
    second = document(capsys, "project", stores["one"], "--axis", ours / "pca.safetensors", "--component", "2")
    assert means(second) == pytest.approx(means(document(capsys, "project", stores["one"], "--component", "2")), abs=1e-6)
    # The published files do not name their layers: places 0 and 1 are blocks 0 and 1 for whoever reads them.
    unnamed = document(capsys, "project", stores["one"], "--axis", published / "axis.pt", "--layers", "0")
    raw = document(capsys, "project", stores["one"], "--axis", published / "assistant_axis.pt", "--layers", "0")
    assert means(unnamed) == pytest.approx({name: along for name, (along, _) in ALL.items()}, abs=1e-6)
    assert means(unnamed, "position")["default"] == pytest.approx(1, abs=1e-6)
    assert means(raw) == means(unnamed)
    assert set(means(raw, "position").values()) == {None}
    assert "counted from 0" in raw["recommended_because"]
    assert "does not say which model" in raw["notes"][0]


def test_spread_is_that_of_single_rows(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    save_file({"axis": np.eye(6, dtype=np.float32)[[5, 5]] * 7}, tmp_path / "a.safetensors", metadata={"layers": "[0, 3]"})
    found = document(capsys, "project", stores["one"], "--axis", tmp_path / "a.safetensors")
    assert means(found) == pytest.approx(dict.fromkeys(ALL, 0), abs=1e-6)
    assert means(found, "spread") == pytest.approx(dict.fromkeys(ALL, np.std([0.5, -0.5, 0.5, -0.5], ddof=1)), abs=1e-6)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_single_rows_as_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str) -> None:
    toy = Planted(unit_rows=5)
    url, out = toy.reduced(tmp_path / "store"), tmp_path / f"rows.{suffix}"
    writer = ScoreWriter(url, "judge-1", {})
    writer.write(1, toy.rollouts(1), [Judgement(3, "yes")] * 5)
    publish_scores(url, "judge-1")
    out.write_text("an older file")
    found = document(capsys, "project", url, "--layers", "3,0", "--out", out)
    table = pq.read_table(out) if suffix == "parquet" else pyarrow.csv.read_csv(out)
    assert table.column_names == [
        "rollout",
        "archetype",
        *("system_prompt", "question", "sample", "turn", "layer"),
        "projection",
        "position",
        "score",
    ]
    lines = table.to_pylist()
    assert [(line["rollout"], line["layer"]) for line in lines] == [(row, layer) for row in range(24) for layer in (0, 3)]
    for line in lines:
        key, along = toy.plan.keys[line["rollout"]], ALL[line["archetype"]][0]
        assert (line["archetype"], line["system_prompt"], line["question"]) == (key.archetype, key.system_prompt, key.question)
        assert (line["sample"], line["turn"], line["score"]) == (key.sample, key.turn, 3 if 5 <= line["rollout"] < 10 else -1)
        assert line["projection"] == pytest.approx((line["layer"] + 1) * along, abs=1e-5)
        assert line["position"] == pytest.approx(along / 2, abs=1e-5)
    assert found["out"] == str(out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_refused_rows_do_not_count_and_units_do_not_matter(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = Planted(unit_rows=7).fill(tmp_path / "store", refused={1: "empty"})
    axis = Planted().reduced(tmp_path / "axis")
    found = document(capsys, "project", url, "--axis", axis)
    assert (found["rows"], means(found, "rows")["sage"], means(found, "rows")["bard"]) == (23, 3, 4)
    assert means(found)["sage"] == pytest.approx(4, abs=1e-5)


def test_the_table_says_what_the_document_says(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    code, out, _ = call(capsys, "project", stores["one"], "--top", "1", "--out", tmp_path / "rows.csv")
    assert code == 0
    for text in ("24 rows on the axis of", "Layer 3", "default", "8.00", "4 more", "ghost", "\u22124.00", str(tmp_path / "rows.csv")):
        assert text in out
    assert "bard" not in out


def test_wrong_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    torch.save(torch.zeros(6), files / "flat.pt")
    (files / "broken.pt").write_bytes(b"no tensor")
    (files / "broken.safetensors").write_bytes(b"no tensor")
    save_file({"axis": np.ones((3, 6), np.float32)}, files / "lines.safetensors", metadata={"layers": "[0, 3]"})
    save_file({"axis": np.ones((2, 6), np.float32)}, files / "good.safetensors", metadata={"layers": "[0, 7]"})
    one, out = stores["one"], files / "rows.parquet"
    places = (files, Path(one).parent)
    before = [_tree(place) for place in places]
    for arguments, complaint in (
        ((one, "--layers", "2"), "there is no layer 2; there are [0, 3]"),
        ((one, "--axis", files / "good.safetensors"), "layer 7 was not captured; there are [0, 3], choose with --layers"),
        ((one, "--axis", stores["wide"]), "has hidden size 9, and"),
        ((stores["bare"],), "no axis was computed yet"),
        ((one, "--axis", stores["bare"]), "no axis was computed yet"),
        ((one, "--axis", f"{one}@nothing"), "there is no result nothing"),
        ((one, "--component", "9"), "there is no component 9; there are 1 to"),
        ((one, "--axis", files / "good.safetensors", "--component", "1"), "has no pc_1; there are axis; components are in pca.safetensors"),
        ((one, "--axis", files / "flat.pt"), "expected finite numbers, (layers, hidden)"),
        ((one, "--axis", files / "lines.safetensors"), "one line for each of its layers"),
        ((one, "--axis", files / "broken.pt"), "cannot be read as tensors"),
        ((one, "--axis", files / "broken.safetensors"), "cannot be read as safetensors"),
        ((one, "--axis", files / "none.pt"), "there is no such file"),
        ((one, "--layers", "x"), "expected decoder blocks"),
        ((one, "--out", files / "rows.txt"), "ends with .parquet or .csv"),
        ((one, "--out", files / "deeper" / "rows.csv"), "its folder must be there"),
        ((one, "--axis", stores["wide"], "--out", out), "hidden size"),
        ((), "expected a STORE, or --conversations with --model"),
        ((one, "--model", "builtin:tiny-persona"), "--model belongs to --conversations"),
        ((one, "--conversations", files), "not both"),
        (("--conversations", files, "--model", "builtin:tiny-persona"), "needs --model, which reads them, and --axis"),
        (("--conversations", files, "--axis", one, "--model", "m", "--address", "auto"), "--address needs --store"),
    ):
        code, printed, err = call(capsys, "project", *arguments)
        assert (code, printed, len(err.strip().splitlines())) == (2, "", 1), (arguments, err)
        assert complaint in err
    assert [_tree(place) for place in places] == before


def test_a_store_that_has_no_rows_yet(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    url = Planted().fill(tmp_path / "empty", range(0))
    code, _, err = call(capsys, "project", url, "--axis", stores["one"], "--out", tmp_path / "rows.csv")
    assert (code, "no committed row has the layers [3] yet" in err, (tmp_path / "rows.csv").exists()) == (2, True, False)
