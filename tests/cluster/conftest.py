"""Every test of this folder starts a cluster, and has the machine for itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from persona_ray import pipeline
from tests.cluster.runs import QUIET, job_for

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Pytest hands over all tests, not only those below."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.serial)


@pytest.fixture(scope="session")
def finished(chat_model: Path, small_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run, of two stages. To be read, or copied."""
    url = tmp_path_factory.mktemp("finished") / "store"
    outcome = pipeline.run(job_for(chat_model, small_catalog, url, shards={"stages": 2}), QUIET)
    assert (outcome.units_done, outcome.stopped) == (8, None)
    assert outcome.counts.asked == outcome.counts.stored + outcome.counts.refused == 32
    return url
