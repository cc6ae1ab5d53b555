"""What an hour of a GPU costs, and who must say so."""

from __future__ import annotations

from typing import Any

import pytest

from persona_ray.config import Job, parse_job
from persona_ray.errors import InputError
from persona_ray.shards.hardware import ACCELERATORS
from persona_ray.shards.prices import GPU_HOUR, devices_of, price_of, required_price


def job(**sections: Any) -> Job:
    return parse_job({"model": {"id": "m"}, "store": {"url": "s"}, **sections})


def test_names_are_rays_and_every_price_says_where_and_when() -> None:
    assert set(GPU_HOUR) <= set(ACCELERATORS)
    assert all(price.per_gpu_hour > 0 and "2025" in price.source for price in GPU_HOUR.values())


def test_the_jobs_own_price_wins_and_a_cpu_has_none() -> None:
    listed = price_of(job(shards={"accelerator": "H100"}))
    assert listed == GPU_HOUR["H100"]
    own = price_of(job(shards={"accelerator": "H100"}, limits={"gpu_hour_price": 1.5}))
    assert own is not None
    assert (own.per_gpu_hour, own.source) == (1.5, "limits.gpu_hour_price")
    assert price_of(job()) is price_of(job(shards={"accelerator": "H20"})) is None
    assert price_of(job(shards={"accelerator": "H100", "gpus_per_shard": 0})) is None
    assert required_price(job(shards={"gpus_per_shard": 0}, limits={"gpu_hour_price": 0.1})) == 0.1


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ({}, "this hardware is known; give limits.gpu_hour_price, or shards.accelerator"),
        ({"accelerator": "H20"}, "a H20 is known; give limits.gpu_hour_price"),
        ({"gpus_per_shard": 0}, "this hardware is known; give limits.gpu_hour_price"),
    ],
)
def test_without_a_price_money_is_no_limit(shards: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        required_price(job(shards=shards, limits={"money": 5}))
    assert str(refused.value).startswith("limits.money: no list price of")
    assert words in str(refused.value)


def test_what_is_paid_for() -> None:
    assert [devices_of(1, 4), devices_of(0.5, 4), devices_of(0, 4)] == [4, 2, 4]
