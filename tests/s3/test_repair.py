"""Verification, requeue and leftovers on a real S3 protocol, through both clients."""

from __future__ import annotations

import time

from persona_ray.store.address import open_backend
from persona_ray.store.repair import gc, requeue
from persona_ray.store.verify import verify
from tests.s3.conftest import Place
from tests.store.conftest import Toy

DAY_S = 86_400


def test_a_damaged_unit_is_found_requeued_and_made_again(place: Place) -> None:
    toy = Toy()
    url = toy.fill(place.url)
    assert verify(url).is_right
    backend = open_backend(url)
    backend.delete("activations/c/1/0/0")
    backend.create_once("activations/c/1/0/0", b"something else")
    assert verify(url).wrong_units == (1,)
    (done,) = requeue(url, [1])
    assert done.keeps_text
    assert verify(url).is_right
    toy.fill(url)
    assert verify(url).is_right
    assert {leftover.key.partition("/")[0] for leftover in gc(url, delete=True, clock=lambda: time.time() + 2 * DAY_S).leftovers} == {
        "_quarantine"
    }
    assert not any(key.startswith("_quarantine/") for key in backend.list_keys(""))
