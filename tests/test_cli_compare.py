"""`persona-ray compare`, on stores whose axes were planted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from persona_ray.store.reader import open_store
from tests.planted import PLACES, Planted, reduce_again
from tests.store.conftest import Toy, _impatient_disk, _tree  # noqa: F401
from tests.test_cli_results import call, document

CUBED = {name: (along**3, across) for name, (along, across) in PLACES.items()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One model, a relative whose plane is turned by 30 degrees, and another model whose archetypes lie at the cubes."""
    folder = tmp_path_factory.mktemp("stores")
    return {
        "one": Planted().reduced(folder / "one"),
        "relative": Planted(model="toy/base", turned_degrees=30).reduced(folder / "relative"),
        "other": Planted(model="toy/other", places=CUBED, hidden=9, layers=(0, 1, 2, 3)).reduced(folder / "other"),
    }


def compare(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    pairs: list[dict[str, Any]] = document(capsys, "compare", *arguments)["pairs"]
    return pairs


def test_a_relative_is_turned_by_what_was_planted(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    [pair] = compare(capsys, stores["one"], stores["relative"], "--components", "2")
    turned = np.cos(np.radians(30))
    assert [(layer["layer_a"], layer["layer_b"]) for layer in pair["layers"]] == [(0, 0), (3, 3)]
    for layer in pair["layers"]:
        assert layer["axis_cosine"] == pytest.approx(turned, abs=1e-6)
        assert layer["component_cosines"] == pytest.approx([turned, 1], abs=1e-6)
        assert layer["principal_angles"] == pytest.approx([0, 30], abs=1e-4)
        # A turn of the whole space leaves every archetype where it was in it.
        assert layer["position_pearson"] == layer["position_spearman"] == pytest.approx(1)
        assert layer["loading_pearson"] == pytest.approx([1, 1])
    assert pair["at_best_of_a"] == pair["layers"][1]
    assert (pair["a"]["best_layer"], pair["shared"], pair["left_out"]) == (3, list(PLACES), [])
    assert pair["notes"] == ["cosines and angles mean something only if one of toy/model and toy/base was trained from the other"]


def test_across_models_archetypes_are_held_against_each_other(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    [pair] = compare(capsys, stores["one"], stores["other"], "--components", "2")
    along, cubed = ([place for place, _ in places.values()] for places in (PLACES, CUBED))
    best = pair["at_best"]
    assert (best["layer_a"], best["layer_b"]) == (3, 2)
    assert best["position_pearson"] == pytest.approx(np.corrcoef(along, cubed)[0, 1], abs=1e-6)
    assert best["loading_pearson"] == pytest.approx([np.corrcoef(along, cubed)[0, 1], 1], abs=1e-6)
    assert best["position_spearman"] == pytest.approx(1)
    assert (best["axis_cosine"], best["component_cosines"], best["principal_angles"], pair["at_best_of_a"]) == (None,) * 4
    # By relative depth: both models end with layer 3, as far as the stores say.
    assert [(layer["layer_a"], layer["layer_b"]) for layer in pair["layers"]] == [(0, 0), (3, 3)]
    assert any("hidden sizes are 6 and 9" in note for note in pair["notes"])


def test_three_stores_are_three_pairs_and_a_store_equals_itself(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    pairs = compare(capsys, *stores.values())
    assert [(pair["a"]["store"], pair["b"]["store"]) for pair in pairs] == [
        (stores["one"], stores["relative"]),
        (stores["one"], stores["other"]),
        (stores["relative"], stores["other"]),
    ]
    name = open_store(stores["one"]).latest_reduced()
    [same] = compare(capsys, stores["one"], f"{stores['one']}@{name}", "--components", "2")
    assert [same["at_best"][quantity] for quantity in ("axis_cosine", "position_pearson")] == pytest.approx([1, 1])
    assert same["at_best"]["principal_angles"] == pytest.approx([0, 0], abs=1e-5)
    assert same["notes"] == []


def test_the_order_of_archetypes_changes_nothing(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    again = Planted(archetypes=("default", *reversed(PLACES)), model="toy/other", places=CUBED, hidden=9, layers=(0, 1, 2, 3))
    [pair] = compare(capsys, stores["one"], stores["other"])
    [other] = compare(capsys, stores["one"], again.reduced(tmp_path / "again"))
    for quantity in ("position_pearson", "position_spearman"):
        assert other["at_best"][quantity] == pytest.approx(pair["at_best"][quantity])
    assert other["shared"] == pair["shared"]


def test_another_named_result_and_other_settings_are_said(
    capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path
) -> None:
    url = str(shutil.copytree(stores["one"], tmp_path / "copy"))
    first = open_store(url).latest_reduced()
    second = reduce_again(url, preset="published-code", min_count=3)
    [pair] = compare(capsys, f"{url}@{first}", url)
    assert pair["b"]["preset"] == "published-code"
    assert [note.partition(" differs")[0] for note in pair["notes"]] == ["preset", "min_count"]
    code, _, err = call(capsys, "compare", url, f"{url}@nothing")
    assert (code, "there is no result nothing" in err) == (2, True)
    assert open_store(url).latest_reduced() == second.name


def test_archetypes_and_layers_that_one_lacks_are_named(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    few = {name: PLACES[name] for name in ("sage", "bard")} | {"pirate": (0.3, 0.1)}
    fewer = Planted(archetypes=("default", *few), places=few, rows=16, layers=(0, 1)).reduced(tmp_path / "fewer", rank=1)
    [pair] = compare(capsys, stores["one"], fewer)
    assert (pair["shared"], pair["left_out"]) == (["sage", "bard"], ["crone", "ghost", "imp", "pirate"])
    assert (pair["at_best_of_a"], pair["at_best"]["position_pearson"]) == (None, None)
    assert pair["layers"][0]["axis_cosine"] is not None
    said = " ".join(pair["notes"])
    assert "lacks layer 3" in said
    assert "no correlations: 2 archetypes" in said
    assert "components compared: 1, " in said


def test_the_table_says_what_the_document_says(capsys: pytest.CaptureFixture[str], stores: dict[str, str]) -> None:
    code, out, _ = call(capsys, "compare", stores["one"], stores["relative"], "--components", "2")
    assert code == 0
    for text in ("0.8660", "30.0°", "toy/base was trained", "5 archetypes", "loadings"):
        assert text in " ".join(out.split())
    code, out, _ = call(capsys, "compare", stores["one"], stores["other"])
    assert (code, "°" in out, "hidden sizes are 6 and 9" in " ".join(out.split())) == (0, False, True)


def test_wrong_input_is_one_line_and_writes_nothing(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    bare = Toy(rows=12).fill(tmp_path / "bare")
    few = {"sage": (1.0, 0.0), "pirate": (-1.0, 0.5)}
    strange = Planted(archetypes=("default", *few), places=few, rows=12, hidden=8).reduced(tmp_path / "strange")
    places = (tmp_path, Path(stores["one"]).parent)
    before = [_tree(place) for place in places]
    for arguments, complaint in (
        ((stores["one"],), "expected two stores or more"),
        ((stores["one"], stores["one"]), "is named twice"),
        ((stores["one"], bare), "no axis was computed yet"),
        ((stores["one"], str(tmp_path / "nowhere")), "nowhere"),
        ((stores["one"], strange), "cannot be compared: hidden sizes 6 and 8, and 1 archetypes with a role vector in both"),
        ((stores["one"], "@name"), "expected STORE, or STORE@NAME"),
        ((stores["one"], stores["other"], "--components", "0"), "components"),
    ):
        code, out, err = call(capsys, "compare", *arguments)
        assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
        assert complaint in err
    assert [_tree(place) for place in places] == before


def test_the_report_draws_the_others(capsys: pytest.CaptureFixture[str], stores: dict[str, str], tmp_path: Path) -> None:
    out, others = tmp_path / "report.html", ("--compare", stores["relative"], "--compare", stores["other"])
    document(capsys, "report", stores["one"], "--out", out, *others)
    page = out.read_text(encoding="utf-8")
    assert all(text in page for text in ('id="compare-0"', 'id="compare-1"', stores["other"], "0.8660"))
    code, _, err = call(capsys, "report", stores["one"], "--out", tmp_path / "none.html", "--compare", tmp_path / "nowhere")
    assert (code, len(err.strip().splitlines()), (tmp_path / "none.html").exists()) == (2, 1, False)
