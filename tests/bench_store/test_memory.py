from __future__ import annotations

from pathlib import Path

import pytest

from persona_ray.bench_store.memory import peaks_above_start
from persona_ray.bench_store.settings import Settings
from persona_ray.errors import InputError


def test_what_is_wrong_in_the_process_of_its_own_comes_back(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        peaks_above_start(str(tmp_path / "none"), Settings(pairs=1, units=1, threads=1, layers=2, hidden=64, unit_mb=0.002))
