"""Columns into a Parquet or CSV file, batch by batch, so that memory does not depend on the number of lines."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from persona_ray.errors import InputError

WRITERS: Mapping[str, Callable[[Any, pa.Schema], Any]] = {".parquet": pq.ParquetWriter, ".csv": pyarrow.csv.CSVWriter}
Columns = Mapping[str, Any]


def check_table_file(path: Path) -> None:
    """Raises InputError for a name that is neither .parquet nor .csv, or a place where nothing can be written."""
    if path.suffix not in WRITERS:
        raise InputError(f"{path}: expected a file name that ends with .parquet or .csv")
    if path.is_dir() or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"{path}: not a file that can be written; its folder must be there")


@contextmanager
def table_file(path: Path, schema: pa.Schema) -> Iterator[Callable[[Columns], None]]:
    """Gives a function that appends columns (all of the schema's, of one length). `path` is there, or replaced, once all is written.

    A killed one leaves `.{name}.incomplete-...` behind. Raises InputError as `check_table_file`.
    """
    check_table_file(path)
    draft = path.with_name(f".{path.name}.incomplete-{uuid.uuid4().hex[:8]}")
    try:
        with WRITERS[path.suffix](draft, schema) as writer:
            yield lambda columns: writer.write_table(pa.table(dict(columns), schema=schema))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
