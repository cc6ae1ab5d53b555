"""A job's costs: of the whole, and of what is left to do where the store has begun. Writes nothing, starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_ray.costs.assumptions import Assumption, Assumptions, calls_somebody, default_assumptions
from persona_ray.costs.conversations import Lengths, like_rollouts, read_lengths
from persona_ray.costs.formulas import Rates, Replica, Rows, capture_gpu_s, generation_gpu_s, prefill_flops
from persona_ray.costs.speed import measured_rates, rates_of, why_no_rates
from persona_ray.errors import InputError
from persona_ray.planning import Setup
from persona_ray.shards.fitting import DTYPE_BYTES
from persona_ray.shards.prices import devices_of, required_price
from persona_ray.store.expected import (
    GETS_PER_UNIT,
    GETS_PER_UNIT_OF_MORE_LAYERS,
    judge_keys,
    plan_objects,
    score_keys,
    unit_bytes,
    unit_keys,
)
from persona_ray.store.plans import Plans
from persona_ray.store.prepare import stored_plans
from persona_ray.store.reader import open_store

HOUR_S = 3600
GB = 1e9
NOT_COUNTED = (
    "loading the model, waiting, work that is lost and done again, requests that are tried again or list what is there, "
    "the reduction, error bars and steering check, and what is read of the store afterwards"
)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Costs of a job by what is assumed of it."""

    setup: Setup
    plans: Plans
    """As the run will find them or leave them."""
    before: Plans | None
    """As they are; None: there is no store yet."""
    lengths: Lengths
    assumptions: Assumptions
    rates: Rates | None

    def facts(self) -> dict[str, Any]:
        """Plain JSON values: `whole`, `left` (None: all of it), `assumptions`, `speed`, `not_counted`."""
        left = None if self.before is None else self.costs(self.setup.units_to_do(self.plans), only_new=True)
        return {
            "whole": self.costs(self.setup.units(self.plans)),
            "left": left,
            "speed": None if self.rates is None else {"flops": self.rates.flops, "bytes": self.rates.bytes, "source": self.rates.source},
            "why_no_speed": why_no_rates(self.setup.job) if self.rates is None else None,
            "assumptions": [
                {"name": name, "value": one.value, "unit": one.unit, "source": one.source} for name, one in self.assumptions.items()
            ],
            "not_counted": NOT_COUNTED,
        }

    def costs(self, units: Sequence[int], *, only_new: bool = False) -> dict[str, Any]:
        """Of these units, and of what the store has besides units: all of that, or `only_new`, what is not there yet."""
        rows = self.rows(units)
        answered = rows.number * rows.answer_tokens
        gpu_hours = self.gpu_hours(rows)
        objects, num_bytes = self._objects(units, only_new=only_new), self._bytes(units, only_new=only_new)
        judge = self._judge(units, rows)
        requests = {"put": objects["rollouts"] + objects["scores"], "get": self._gets_per_unit * len(units)}
        total = gpu_hours["total"]
        replicas = self.setup.job.shards.replicas
        return {
            "rows": sum(len(self.plans.rows(unit)) for unit in units),
            "units": len(units),
            "prompt_tokens": round(rows.number * rows.prompt_tokens),
            "answer_tokens": round(answered),
            "tokens": round(rows.number * rows.tokens),
            "prefill_flops": prefill_flops(self.replica, rows),
            "gpu_hours": gpu_hours,
            "hours": None if total is None or replicas == "auto" else total / (replicas * self.devices),
            "bytes": num_bytes,
            "objects": objects,
            "requests": requests,
            "judge": judge,
            "money": self._money(total, requests, judge, num_bytes),
        }

    def rows(self, units: Sequence[int]) -> Rows:
        """The rows of `units` that get as far as the model, and how long they are."""
        return Rows(
            number=round(self.lengths.usable_share * sum(len(self.plans.rows(unit)) for unit in units)),
            prompt_tokens=self.assumptions.number("prompt_tokens"),
            answer_tokens=self.assumptions.number("answer_tokens"),
        )

    def gpu_hours(self, rows: Rows) -> dict[str, float | None]:
        """`capture`, `generation` (0 where texts are there already) and their `total`; None where a speed is not known."""
        if self.rates is None:
            return {"capture": None, "generation": None, "total": None}
        padding = self.assumptions.number("padding")
        capture = capture_gpu_s(self.replica, rows, self.rates, padding) / HOUR_S
        seconds = generation_gpu_s(self.replica, rows, self.rates, padding) if self.generates else 0.0
        generation = None if seconds is None else seconds / HOUR_S
        return {"capture": capture, "generation": generation, "total": None if generation is None else capture + generation}

    @property
    def generates(self) -> bool:
        """Whether answers are drawn; they are not for imported text, nor for further layers of rows that are there."""
        return self.setup.work.sampling is not None and self.layer_set == 0

    @property
    def layer_set(self) -> int:
        """Number of the set of layers that is written."""
        return self.plans.set_of(self.setup.captured)

    @property
    def devices(self) -> float:
        """What is paid for of one replica."""
        return devices_of(self.setup.job.shards.gpus_per_shard, self.setup.replica.num_shards)

    @property
    def replica(self) -> Replica:
        """Its size and cut."""
        setup = self.setup
        return Replica(
            size=setup.size,
            cut=setup.cut,
            captured=setup.captured,
            dtype_bytes=DTYPE_BYTES[setup.identity.dtype],
            unit_rows=self.plans.unit_rows,
            decode_tokens=setup.replica.decode_tokens,
            max_new_tokens=setup.job.rollouts.max_new_tokens,
        )

    @property
    def _gets_per_unit(self) -> int:
        return GETS_PER_UNIT if self.layer_set == 0 else GETS_PER_UNIT_OF_MORE_LAYERS

    @cached_property
    def plan_bytes(self) -> Mapping[str, int]:
        """Key -> bytes of what the store has besides units, once the run has prepared it."""
        return plan_objects(self.plans, self.setup.job.store.url)

    def _new_plan_bytes(self, *, only_new: bool) -> dict[str, int]:
        there = plan_objects(self.before, self.setup.job.store.url) if only_new and self.before is not None else {}
        return {key: size for key, size in self.plan_bytes.items() if key not in there}

    def _objects(self, units: Sequence[int], *, only_new: bool) -> dict[str, int]:
        """Objects at the end of the rollout stage, and those that the judge adds."""
        each = len(unit_keys(self.plans, self.plans.units[0], self.layer_set))
        return {"rollouts": len(self._new_plan_bytes(only_new=only_new)) + each * len(units), "scores": self._scores(only_new=only_new)}

    def _scores(self, *, only_new: bool) -> int:
        """Objects of the job's judge, of all units of the job."""
        judge = self.setup.judge
        if judge is None:
            return 0
        scored = open_store(self.setup.job.store.url).scored_units(judge.name) if only_new else frozenset()
        units = set(self.setup.units(self.plans)) - scored
        once = 0 if scored else len(judge_keys(judge.name))
        return once + len(units) * len(score_keys(self.plans, self.plans.units[0], judge.name))

    def _bytes(self, units: Sequence[int], *, only_new: bool) -> int:
        """At the end of the rollout stage."""
        sizes = [len(self.plans.rows(unit)) for unit in units]
        return sum(self._new_plan_bytes(only_new=only_new).values()) + sum(
            sizes.count(size) * self._unit_bytes(size) for size in set(sizes)
        )

    def _unit_bytes(self, num_rows: int) -> int:
        texts = self._texts[:num_rows]
        return unit_bytes(self.plans, texts, self.layer_set, self.assumptions.number("stored_share")) * num_rows // len(texts)

    @cached_property
    def _texts(self) -> tuple[Any, ...]:
        """A unit's rows as the store will have them; in work order every unit is like any other."""
        return like_rollouts(
            self.setup.rows[: self.plans.unit_rows],
            self.setup.work.transcriber(),
            max_length=self.setup.work.max_length,
            answer_tokens=None if self.setup.work.sampling is None else self.assumptions.number("answer_tokens"),
        )

    def _judge(self, units: Sequence[int], rows: Rows) -> dict[str, int]:
        """Calls of another model, and the tokens it reads and writes; none for a judge that looks things up."""
        calls = sum(len(self.plans.rows(unit)) for unit in units) if calls_somebody(self.setup.job) else 0
        if not calls:
            return {"calls": 0, "input_tokens": 0, "output_tokens": 0}
        read = self.assumptions.number("judge_prompt_tokens") + rows.answer_tokens
        written = self.assumptions.number("judge_answer_tokens")
        return {"calls": calls, "input_tokens": round(calls * read), "output_tokens": round(calls * written)}

    def _money(self, gpu_hours: float | None, requests: Mapping[str, int], judge: Mapping[str, int], num_bytes: int) -> dict[str, Any]:
        """In dollars: `total` of the run is None if a part of it is not known; storage is by month."""
        a = self.assumptions
        price = a.value("gpu_hour")
        gpu = None if gpu_hours is None or price is None else gpu_hours * price
        asked = (requests["put"] * a.number("put_1000") + requests["get"] * a.number("get_1000")) / 1000
        judged = 0.0
        if judge["calls"] and self.setup.job.judge.backend == "endpoint":
            prices = a.number("judge_input_million"), a.number("judge_output_million")
            judged = (judge["input_tokens"] * prices[0] + judge["output_tokens"] * prices[1]) / 1e6
        return {
            "gpu": gpu,
            "requests": asked,
            "judge": judged,
            "total": None if gpu is None else gpu + asked + judged,
            "storage_per_month": num_bytes / GB * a.number("storage_gb_month"),
        }


def estimate(setup: Setup, *, assume: Sequence[str] = (), bench: Path | None = None) -> Estimate:
    """What the job will cost. `assume`: `name=number` in place of an assumption; `bench`: a measured speed in place of data sheets.

    Raises InputError for another name or no number, or for a file that is no benchmark's.
    """
    lengths = read_lengths(
        setup.rows,
        setup.work.transcriber(),
        max_length=setup.work.max_length,
        max_new_tokens=None if setup.work.sampling is None else setup.job.rollouts.max_new_tokens,
    )
    assumptions = _with_lengths(default_assumptions(setup.job), lengths)
    measured = None if bench is None else measured_rates(bench)
    if measured is not None:
        shares = {"prefill_share", "decode_share"}
        assumptions = Assumptions({name: one for name, one in assumptions.items() if name not in shares})
    assumptions = assumptions.replaced(assume)
    before, plans = stored_plans(setup.job.store.url), setup.plans()
    files = tuple(file if file.job else replace(file, job=setup.job.as_dict()) for file in plans.files)
    return Estimate(
        setup=setup,
        plans=replace(plans, files=files),
        before=before,
        lengths=lengths,
        assumptions=assumptions,
        rates=measured or rates_of(setup.job, assumptions),
    )


def _with_lengths(assumptions: Assumptions, lengths: Lengths) -> Assumptions:
    found = {"prompt_tokens": Assumption(round(lengths.prompt_tokens, 2), "tokens a prompt", lengths.source), **assumptions}
    if lengths.answer_tokens is not None:
        found["answer_tokens"] = Assumption(round(lengths.answer_tokens, 2), "tokens an answer", lengths.source)
    return Assumptions(found)


GENEROUS = 2
"""A limit is refused as too small only if it is below this part of what one unit is expected to cost."""


def require_a_unit(setup: Setup, plans: Plans, units: Sequence[int]) -> None:
    """Raises InputError if the job's hours or money would be over, as far as can be told, before one of `units` is done.

    Also if there is a limit of money, and no price.
    """
    limits = setup.job.limits
    if limits.money is not None:
        required_price(setup.job)
    if not units or (limits.hours is None and limits.money is None):
        return
    expected = estimate(setup)
    gpu_hours = expected.gpu_hours(expected.rows(units[:1]))["total"]
    if gpu_hours is None:
        return
    hours, price = gpu_hours / expected.devices, expected.assumptions.value("gpu_hour")
    one = f"one unit of {len(plans.rows(units[0]))} rows"
    how = "persona-ray plan shows how that is estimated"
    if limits.hours is not None and limits.hours < hours / GENEROUS:
        raise InputError(f"limits.hours: {limits.hours:g}, and {one} takes about {hours:.2g}; {how}")
    if limits.money is not None and price is not None and limits.money < gpu_hours * price / GENEROUS:
        raise InputError(f"limits.money: {limits.money:g}, and {one} costs about {gpu_hours * price:.2g}; {how}")
