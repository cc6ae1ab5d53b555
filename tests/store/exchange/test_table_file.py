from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from persona_ray.store.exchange.table_file import table_file

SCHEMA = pa.schema([("name", pa.string()), ("value", pa.float64())])


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_batches_come_back_as_one_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    with table_file(path, SCHEMA) as write:
        write({"name": ["a, b", 'quo"te'], "value": [1.5, None]})
        assert not path.exists()
        write({"name": ["c"], "value": [3.0]})
    table = pq.read_table(path) if suffix == ".parquet" else pyarrow.csv.read_csv(path)
    assert table.to_pydict() == {"name": ["a, b", 'quo"te', "c"], "value": [1.5, None, 3.0]}


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    path.write_text("older")
    with pytest.raises(ZeroDivisionError), table_file(path, SCHEMA) as write:
        write({"name": ["a"], "value": [1 / 0]})
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]
