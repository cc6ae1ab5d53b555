"""What an hour of one accelerator costs, by the names that Ray gives them: list prices, in US dollars, on demand.

Prices of one GPU for an hour with its share of the machine, as public lists showed them about 2025; each names its provider, and
none is checked again. They differ by a factor of three between providers and fall with the years: a team that knows its own sets
`limits.gpu_hour_price`. Spot prices are a third to a half of these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from persona_ray.config import Job
from persona_ray.errors import InputError

LISTED = "2025"
"""When the lists below were current."""


@dataclass(frozen=True, slots=True)
class Price:
    """Money for one GPU and hour, and who says so."""

    per_gpu_hour: float
    source: str


def _listed(dollars: float, where: str) -> Price:
    return Price(dollars, f"{where}, list price on demand, {LISTED}")


GPU_HOUR: Mapping[str, Price] = {
    "T4": _listed(0.526, "AWS g4dn.xlarge"),
    "V100": _listed(3.06, "AWS p3.8xlarge / 4"),
    "A10G": _listed(1.006, "AWS g5.xlarge"),
    "L4": _listed(0.805, "AWS g6.xlarge"),
    "L40S": _listed(1.55, "Nebius, 8 vCPUs"),
    "A100": _listed(1.29, "Lambda gpu_8x_a100 / 8"),
    "A100-40G": _listed(1.29, "Lambda gpu_8x_a100 / 8"),
    "A100-80G": _listed(1.89, "RunPod, SXM"),
    "H100": _listed(2.99, "Lambda gpu_8x_h100_sxm5 / 8"),
    "H200": _listed(3.50, "Nebius, SXM"),
    "B200": _listed(5.50, "Nebius, SXM / 8"),
}
"""Ray accelerator type -> list price. Types that are missing here have no price that we could name."""


def price_of(job: Job) -> Price | None:
    """Of one GPU of the job for an hour (of one shard, where shards run on CPU); None: it is not known."""
    if job.limits.gpu_hour_price is not None:
        return Price(job.limits.gpu_hour_price, "limits.gpu_hour_price")
    return GPU_HOUR.get(job.shards.accelerator or "") if job.shards.gpus_per_shard else None


def required_price(job: Job) -> float:
    """`price_of` for a job that has a limit of money. Raises InputError if it is not known."""
    price = price_of(job)
    if price is None:
        what = f"a {job.shards.accelerator}" if job.shards.gpus_per_shard and job.shards.accelerator else "this hardware"
        named = "" if not job.shards.gpus_per_shard or job.shards.accelerator else ", or shards.accelerator"
        raise InputError(f"limits.money: no list price of {what} is known; give limits.gpu_hour_price{named}")
    return price.per_gpu_hour


def devices_of(gpus_per_shard: float, num_shards: int) -> float:
    """What is paid for while one replica lives: its GPUs, or its shards where these run on CPU."""
    return (gpus_per_shard or 1) * num_shards
