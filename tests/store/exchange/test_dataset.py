"""Rows as a Hugging Face dataset, read by datasets alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from persona_ray.errors import InputError
from persona_ray.store.exchange import dataset
from persona_ray.store.exchange.dataset import export_dataset
from persona_ray.store.reader import StoreReader

from .conftest import LEFT_OUT, UNCOMMITTED, without_us

READ = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from datasets import load_dataset
rows = load_dataset(sys.argv[1], split="train", cache_dir=sys.argv[2])
answer = {"rows": [dict(row) for row in rows], "features": {name: str(feature) for name, feature in rows.features.items()}}
"""


@pytest.mark.parametrize("layers", [(), (3,), (0, 3)])
def test_datasets_alone_reads_every_row(store: StoreReader, expected: dict, tmp_path: Path, layers: tuple[int, ...]) -> None:
    units: list[int] = []
    done = export_dataset(store, tmp_path / "out", layers=layers, progress=units.append)
    assert (done.rows, done.left_out, done.ledger_digest) == (len(expected), LEFT_OUT, store.snapshot().digest)
    assert sum(units) == len(store.ledger.committed())
    found = without_us(READ, tmp_path / "out", tmp_path / "cache")
    assert [row["rollout"] for row in found["rows"]] == sorted(expected)
    for row in found["rows"]:
        rollout, score, values_LD = expected[row["rollout"]]
        assert row["rollout"] // 5 != UNCOMMITTED
        assert row["score"] == (None if score == -1 else score)
        assert row["is_default"] == (rollout.key.archetype == "default")
        for name in ("system_prompt", "question", "response", "thinking"):
            assert row[name] == getattr(rollout, name)
        key = rollout.key
        assert (row["archetype"], row["system_prompt_index"], row["question_index"]) == (key.archetype, key.system_prompt, key.question)
        assert (row["sample"], row["turn"], row["finish_reason"]) == (key.sample, key.turn, rollout.finish_reason.name.lower())
        assert row["num_tokens"] == len(rollout.token_ids)
        assert row["response_tokens"] == rollout.response_end - rollout.response_start
        for layer in layers:
            place = store.layers.index(layer)
            np.testing.assert_array_equal(np.array(row[f"activations_layer_{layer}"], np.float32), values_LD[place])
    assert sum("activations" in name for name in found["features"]) == len(layers)
    assert all("length=6" in kind for name, kind in found["features"].items() if "activations" in name)


def test_a_large_one_has_several_files(store: StoreReader, expected: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "ROW_GROUP_BYTES", 1500)
    monkeypatch.setattr(dataset, "SHARD_BYTES", 1000)
    done = export_dataset(store, tmp_path / "out", layers=[0])
    names = [name for name in done.files if name.endswith(".parquet")]
    assert len(names) > 1
    assert names == [f"data/train-{i:05d}-of-{len(names):05d}.parquet" for i in range(len(names))]
    rows = [row for name in names for row in pq.read_table(tmp_path / "out" / name)["rollout"].to_pylist()]
    assert rows == sorted(expected)


def test_the_card_tells_the_viewer_where_to_look(store: StoreReader, tmp_path: Path) -> None:
    export_dataset(store, tmp_path / "out")
    _, header, text = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
    assert fields["size_categories"] == ["n<1K"]
    assert store.snapshot().digest in text
    assert "2: empty answer" in text


def test_what_cannot_be_exported(store: StoreReader, empty_store: StoreReader, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="layer 7 was not captured"):
        export_dataset(store, tmp_path / "out", layers=[7])
    with pytest.raises(InputError, match="asked for twice"):
        export_dataset(store, tmp_path / "out", layers=[3, 3])
    with pytest.raises(InputError, match="nothing to export"):
        export_dataset(empty_store, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
