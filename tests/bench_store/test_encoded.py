from __future__ import annotations

from pathlib import Path

from persona_ray.bench_store.encoded import encoded_share
from persona_ray.bench_store.settings import Settings
from persona_ray.bench_store.work import Work, write
from persona_ray.store.writer import UnitWriter


def test_the_encoded_share_is_that_of_the_objects(tmp_path: Path) -> None:
    work = Work(Settings(pairs=1, units=2, threads=1, layers=2, hidden=64, unit_mb=0.004))
    work.prepare(str(tmp_path))
    writer = UnitWriter(str(tmp_path))
    for unit in work.batch(0):
        write(writer, unit)
    sizes = [path.stat().st_size for path in (tmp_path / "activations" / "c").rglob("*") if path.is_file()]
    assert len(sizes) == 2
    assert encoded_share(str(tmp_path)) == sum(sizes) / (2 * 2 * work.settings.unit_rows * 2 * 64)
