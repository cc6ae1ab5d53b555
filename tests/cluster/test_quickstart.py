"""The README's first command, whole: what it promises, measured on what it leaves behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import persona_ray
from persona_ray.spec import Reduced
from persona_ray.store.reader import StoreReader, open_store

# Two whole runs, on machines that may be busy with other things.
pytestmark = pytest.mark.timeout(900)

DATA = Path(persona_ray.__file__).parent / "data"


def quickstart(out: Path) -> dict[str, Any]:
    """`persona-ray quickstart --json` in a process of its own; its document."""
    command = [sys.executable, "-c", "from persona_ray.cli import main; main()", "quickstart", "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def document(out: Path) -> dict[str, Any]:
    return quickstart(out)


@pytest.fixture(scope="module")
def store(out: Path, document: dict[str, Any]) -> StoreReader:
    return open_store(str(out / "store"))


@pytest.fixture(scope="module")
def reduced(store: StoreReader) -> Reduced:
    name = store.latest_reduced()
    assert name is not None
    return store.reduced(name)


@pytest.fixture(scope="module")
def groups() -> dict[str, set[str]]:
    lexicon = json.loads((DATA / "tiny-persona" / "lexicon.json").read_text())
    found: dict[str, set[str]] = {}
    for name, entry in lexicon["archetypes"].items():
        found.setdefault(entry["group"], set()).add(name)
    return found


def test_every_row_is_accounted_for(document: dict[str, Any], store: StoreReader) -> None:
    rows = document["rows"]
    assert rows["asked"] == rows["stored"] + rows["refused"] == 600
    assert rows["stored"] >= 590
    assert store.plans.num_units >= 16
    assert store.ledger.committed() == frozenset(store.plans.units)
    assert {marker.made["stages"] for marker in store.ledger.markers().values()} == {2}


def test_the_job_asks_for_what_the_tiny_model_has_learned(groups: dict[str, set[str]]) -> None:
    job = yaml.safe_load((DATA / "quickstart.yaml").read_text())
    assert set(job["catalog"]["archetypes"]) == groups["professional"] | groups["mystical"]
    assert len(job["catalog"]["archetypes"]) >= 24


def test_professional_and_mystical_archetypes_do_not_overlap_along_pc1(reduced: Reduced, groups: dict[str, set[str]]) -> None:
    place = reduced.layers.index(reduced.attributes["best_layer"])
    vectors = dict(zip(reduced.archetypes, reduced.role_vector_ALD[:, place], strict=True))
    roles = {name: vector for name, vector in vectors.items() if np.isfinite(vector).all()}
    assert len(roles) == 24
    centre = np.mean(list(roles.values()), axis=0)
    pc1 = reduced.pca_components_LKD[place, 0]
    along = {name: float((vector - centre) @ pc1) for name, vector in roles.items()}
    default = float((reduced.default_vector_LD[place] - centre) @ pc1)
    professional = [along[name] for name in groups["professional"]]
    mystical = [along[name] for name in groups["mystical"]]
    assert min(professional) > max(mystical)
    assert default > max(mystical)
    assert abs(default - np.mean(professional)) < abs(default - np.mean(mystical))
    assert reduced.cos_pc1_axis_L[place] >= 0.5


def test_steering_moves_the_words_both_ways_and_a_random_direction_does_not(document: dict[str, Any]) -> None:
    share = {(arm["cohort"], arm["label"]): arm["assistant_share"] for arm in document["steering"]["arms"]}
    toward = share["far", "+axis"] - share["far", "none"]
    away = share["near", "none"] - share["near", "-axis"]
    assert toward >= 0.10
    assert away >= 0.10
    assert share["far", "+random"] - share["far", "none"] < toward / 2
    assert share["near", "none"] - share["near", "-random"] < away / 2


def test_error_bars_are_those_of_the_stored_rows(document: dict[str, Any], out: Path, reduced: Reduced) -> None:
    found, place = document["certainty"], reduced.layers.index(reduced.attributes["best_layer"])
    assert found["num_questions"] == 12
    assert 0 < found["cone_degrees"] < 45
    assert found["split_half_cosine"] > 0.7
    for name, one in found["roles"].items():
        assert one["low"] < one["position"] < one["high"]
        assert one["position"] == pytest.approx(reduced.attributes["projections"][name][place], rel=1e-5), "two ways to the same number"
    beginning = found["rows_per_archetype"].index(10)
    rows = open_store(str(out / "store")).rows()
    first_ten = np.concatenate([np.flatnonzero(rows.columns["archetype"] == code)[:10] for code in range(len(reduced.archetypes))])
    few = rows.pick(first_ten)
    is_counted = (few.scores() >= 3) | np.isin(few.archetype_names, reduced.attributes["default_archetypes"])
    values_ND = few.layer(reduced.layers[place])
    names, with_vector = np.array(few.archetype_names), set(found["roles"])
    means = {name: values_ND[is_counted & (names == name)].mean(axis=0) for name in {*names[is_counted]} & {*with_vector, "default"}}
    axis_D = means.pop("default") - np.mean(list(means.values()), axis=0)
    cosine = axis_D @ reduced.axis_LD[place] / np.linalg.norm(axis_D) / np.linalg.norm(reduced.axis_LD[place])
    assert found["cosine_with_all_rows"][beginning] == pytest.approx(cosine, rel=1e-4)


def test_layer_and_strength_were_chosen_on_other_questions_than_measured(out: Path, reduced: Reduced) -> None:
    note = json.loads((out / "store" / "reduced" / reduced.name / "steering.json").read_text())
    assert note["questions_chosen_on"]
    assert not set(note["questions_chosen_on"]) & set(note["questions_measured_on"])


def test_a_second_run_generates_nothing_and_changes_nothing(out: Path, document: dict[str, Any]) -> None:
    def objects() -> dict[str, tuple[int, int]]:
        files = (path for path in (out / "store").rglob("*") if path.is_file() and path.name not in {"zarr.json", "latest.json"})
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = objects()
    again = quickstart(out)
    assert again["units_done"] == 0
    assert again["axis"] == document["axis"]
    assert again["steering"] == document["steering"]
    assert objects() == before


@pytest.mark.browser
def test_the_page_shows_the_run_without_an_error(out: Path, document: dict[str, Any]) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"],
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(Path(document["report"]).absolute().as_uri())
        page.wait_for_selector("#map .point")
        text = page.inner_text("body")
        browser.close()
    assert not complaints
    assert "The Assistant Axis of tiny-persona" in text
    assert "default" in text
    assert "600" in text
