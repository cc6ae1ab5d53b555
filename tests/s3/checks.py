"""What must hold of a store after anything: what is committed is whole, of one attempt, and counted once."""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import zarr

from persona_ray.spec import Float32, Rollout
from persona_ray.store.address import open_backend
from persona_ray.store.finish import finish_store
from persona_ray.store.ledger import Ledger
from persona_ray.store.reader import open_store
from persona_ray.store.verify import verify
from tests.s3.writer import said_by, values_of
from tests.store.conftest import Toy


def expected(toy: Toy, unit: int, seed: int, texts: tuple[Rollout, ...]) -> Float32:
    """What writer `seed` makes of those texts, as it is stored."""
    rounded: Float32 = values_of(toy, unit, seed, texts).astype(ml_dtypes.bfloat16).astype(np.float32)
    return rounded


def objects_of(url: str) -> dict[str, str]:
    """Key -> SHA-256 of everything that is there."""
    backend = open_backend(url)
    keys = backend.list_keys("")
    return {key: hashlib.sha256(data).hexdigest() for key, data in zip(keys, backend.get_many(keys), strict=True)}


def check_committed(url: str, toy: Toy, seeds: list[int]) -> dict[str, str]:
    """Every committed unit is whole, as its marker says, and from one attempt at its text. Answers key -> SHA-256 of what is committed."""
    backend, ledger = open_backend(url), Ledger(url)
    store = open_store(url)
    array = zarr.open_array(backend.zarr_store(), path="activations", mode="r")
    digests: dict[str, str] = {}
    for unit, marker in ledger.markers().items():
        assert len(marker.objects) == 5
        for key, record in marker.objects.items():
            data = backend.get(key)
            assert (len(data), hashlib.sha256(data).hexdigest()) == (record.num_bytes, record.sha256), key
            digests[key] = record.sha256
        rows = slice(unit * toy.unit_rows, min((unit + 1) * toy.unit_rows, toy.rows))
        assert (marker.first_row, marker.num_rows, dict(marker.refused)) == (rows.start, rows.stop - rows.start, {})
        (texts,) = store.rollouts([unit])
        assert [rollout.key for rollout in texts] == list(toy.plan.keys[rows])
        assert {rollout.response for rollout in texts} <= {said_by(seed) for seed in seeds}
        assert len({rollout.response for rollout in texts}) == 1
        values_RLD = np.asarray(array[rows])
        makers = [seed for seed in seeds if np.array_equal(values_RLD, expected(toy, unit, seed, texts))]
        assert makers, f"unit {unit}: of no attempt at the text that is there"
    return digests


def check_complete(url: str, toy: Toy, seeds: list[int]) -> dict[str, str]:
    """`check_committed`, and every row is there, counted once; nothing reads as a fill value, and nothing is there twice."""
    digests = check_committed(url, toy, seeds)
    finish_store(url)
    ledger = Ledger(url)
    assert ledger.committed() == frozenset(toy.plan.units)
    counts = ledger.counts()
    assert (counts.asked, counts.stored, counts.refused) == (toy.rows, toy.rows, 0)
    assert sum(marker.num_rows for marker in ledger.markers().values()) == toy.rows
    group = zarr.open_group(open_backend(url).zarr_store(), mode="r")
    assert np.isfinite(np.asarray(group["activations"][: toy.rows])).all()
    assert (np.asarray(group["committed"][: toy.rows]) == 1).all()
    assert (np.asarray(group["status"][: toy.rows]) == 0).all()
    assert (np.asarray(group["response_tokens"][: toy.rows]) > 0).all()
    found = verify(url)
    assert found.is_right, found
    return digests
