"""What is foretold of a store, on a real S3 protocol."""

from __future__ import annotations

from collections.abc import Callable

from persona_ray.store.address import open_backend
from persona_ray.store.expected import plan_objects, unit_keys
from persona_ray.store.plans import read_plans
from tests.s3.conftest import Place
from tests.store.conftest import Toy


def test_every_object_of_a_bucket_is_foretold(make_place: Callable[[str, str], Place]) -> None:
    url = make_place("obstore", "moto").url
    Toy().fill(url)
    backend = open_backend(url)
    plans = read_plans(backend)
    sizes = {found.key: found.num_bytes for found in backend.list_objects("")}
    foretold = plan_objects(plans, url)
    assert sizes.keys() == {*foretold, *(key for unit in plans.units for key in unit_keys(plans, unit))}
    assert {key: sizes[key] for key in foretold} == foretold
