"""Token ids that nobody knows are no damage."""

from __future__ import annotations

from pathlib import Path

from persona_ray.store.exchange.published import export_published
from persona_ray.store.exchange.published_import import import_published
from persona_ray.store.reader import StoreReader
from persona_ray.store.verify import verify


def test_an_import_verifies(store: StoreReader, tmp_path: Path) -> None:
    export_published(store, tmp_path / "out")
    import_published(tmp_path / "out", str(tmp_path / "back"), model_id="toy/model", unit_rows=4)
    found = verify(str(tmp_path / "back"))
    assert [flaw for report in found.units for flaw in report.flaws] == []
    assert found.is_right
