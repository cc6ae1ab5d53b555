"""A store that grows by further runs: more archetypes, questions and layers, without doing anything twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from persona_ray import pipeline
from persona_ray.catalog.load import load_catalog
from persona_ray.errors import InputError
from persona_ray.extra import extra_rows
from persona_ray.planning import prepare
from persona_ray.spec import RowKey
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.cluster.runs import QUIET, files_of, job_for


def contents(url: Path, layers: list[int]) -> dict[RowKey, tuple[bytes, np.ndarray]]:
    """Key -> token ids and activations (L, D) of every stored row."""
    rows = open_store(str(url)).rows(layers)
    return {
        text.key: (np.asarray(text.token_ids).tobytes(), values) for text, values in zip(rows.rollouts(), rows.activations(), strict=True)
    }


def assert_equal(one: Path, other: Path, layers: list[int]) -> None:
    """As sets of rows. Other units are other batches, so the last bits may differ."""
    rows, others = contents(one, layers), contents(other, layers)
    assert rows.keys() == others.keys()
    for key, (tokens, values) in rows.items():
        assert others[key][0] == tokens, key
        np.testing.assert_allclose(others[key][1], values, rtol=1e-4, atol=1e-5)


def test_uncertain_vectors_get_further_rows_in_a_plan_of_their_own_and_only_once(
    chat_model: Path, small_catalog: Path, tmp_path: Path
) -> None:
    url = tmp_path / "store"
    reduce, limits = {"bootstrap": 0, "extra": {"rows": 3, "max_error": 1e-6}}, {"rows": 32}
    job = job_for(chat_model, small_catalog, url, reduce=reduce, limits=limits)
    names = {archetype.name for archetype in load_catalog(str(small_catalog)).archetypes}
    first = pipeline.run(job, QUIET)
    assert (first.units_done, first.stopped, first.extra) == (8, None, None)  # the limit is used up, as far as this run knows
    outcome = pipeline.run(job, QUIET)
    assert outcome.units_done == 0
    assert outcome.counts.asked == outcome.counts.stored + outcome.counts.refused == 32
    assert outcome.extra is not None
    assert outcome.extra.reasons.keys() == names
    assert outcome.extra.counts.asked == outcome.extra.counts.stored + outcome.extra.counts.refused == 3 * len(names)
    assert outcome.reduced.attributes["num_rows"] == outcome.counts.stored + outcome.extra.counts.stored
    store = open_store(str(url))
    plans = store.info()["plans"]
    assert [plan["rows"] for plan in plans] == [32, 3 * len(names)]
    assert [plan["purpose"] is None for plan in plans] == [True, False]
    assert {key.sample for unit in store.plans.files[1].plan.units for key in store.plans.keys(unit)} == {1}
    # Still uncertain, and not given any others.
    again = extra_rows(prepare(job), store.plans, outcome.reduced)
    assert again is not None
    assert again.setup.plans().num_rows == store.plans.num_rows
    assert again.setup.units_to_do(store.plans) == []


def test_a_store_grown_by_archetypes_questions_and_layers_equals_one_made_at_once(
    chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path
) -> None:
    grown = tmp_path / "grown"
    names = [archetype.name for archetype in load_catalog(str(small_catalog)).archetypes]

    few = {"archetypes": names[:3], "questions": 2}
    stride = {"layers": [1, 3]}
    first = pipeline.run(job_for(chat_model, small_catalog, grown, catalog=few, capture=stride), QUIET)
    assert first.counts.asked == 12
    before = files_of(grown)

    with pytest.raises(InputError, match=r"more layers are added to rows that are there, and 20 rows of this job are not planned"):
        pipeline.run(job_for(chat_model, small_catalog, grown), QUIET)
    assert {key for key in files_of(grown) if not key.startswith("_probe")} == {key for key in before if not key.startswith("_probe")}

    more = pipeline.run(job_for(chat_model, small_catalog, grown, capture=stride), QUIET)
    assert (more.counts.asked, more.units_done) == (32, 5)
    assert more.reduced.layers == (1, 3)
    assert_equal(finished, grown, [1, 3])

    # Rows that are there are no reason to stop adding layers, nor the time for further ones.
    stop = {"cosine": 0.5, "patience": 1, "min_per_archetype": 1, "layers": [1]}
    last = pipeline.run(job_for(chat_model, small_catalog, grown, reduce={"stop": stop, "extra": {"rows": 2}}), QUIET)
    assert (last.stopped, last.extra) == (None, None)
    assert (last.counts.asked, last.units_done) == (32, 8)
    assert last.reduced.layers == (0, 1, 2, 3)
    assert_equal(finished, grown, [0, 1, 2, 3])
    after = files_of(grown)
    assert {key: after[key] for key in before} == before, "nothing that was committed is written again"
    found = verify(str(grown))
    assert found.is_right
    assert not found.notes
    info = open_store(str(grown)).info()
    assert [(part["layers"], part["committed"]) for part in info["layer_sets"]] == [([1, 3], 8), ([0, 2], 8)]
    assert [plan["rows"] for plan in info["plans"]] == [12, 20]

    again = pipeline.run(job_for(chat_model, small_catalog, grown), QUIET)
    assert again.units_done == 0
    assert files_of(grown) == after

    # The axis that was computed then can be computed again from the same rows.
    digest = more.reduced.attributes["ledger_digest"]
    assert len(open_store(str(grown), at=digest).rows()) == more.counts.stored


def test_changed_texts_are_another_experiment(chat_model: Path, small_catalog: Path, finished: Path, tmp_path: Path) -> None:
    changed = tmp_path / "catalog.yaml"
    changed.write_text(small_catalog.read_text().replace("?", " today?"))
    before = files_of(finished)
    with pytest.raises(InputError, match="have other texts in the store than in the job"):
        pipeline.run(job_for(chat_model, changed, finished), QUIET)
    assert files_of(finished) == before
