"""How fast a GPU is: by its data sheet and an assumed share of it, or as `persona-ray bench --json` measured it."""

from __future__ import annotations

import json
from pathlib import Path

from persona_ray.config import Job
from persona_ray.costs.assumptions import Assumptions
from persona_ray.costs.formulas import Rates
from persona_ray.errors import InputError
from persona_ray.shards.hardware import accelerator

ENGINE = "engine"
"""The contestant of a benchmark that is ours."""


def rates_of(job: Job, assumptions: Assumptions) -> Rates | None:
    """By the data sheet of the job's accelerator; None on CPU, for an accelerator that has no name, and for float32."""
    name = job.shards.accelerator
    if name is None or not job.shards.gpus_per_shard or job.model.dtype == "float32":
        return None
    sheet = accelerator(name)
    share = assumptions.value("decode_share") if "decode_share" in assumptions else None
    return Rates(
        flops=sheet.flops * assumptions.number("prefill_share"),
        bytes=None if share is None else sheet.bandwidth * share,
        source=f"{name}: data sheet, and the shares assumed below",
    )


def why_no_rates(job: Job) -> str:
    """In words, where `rates_of` is None."""
    if not job.shards.gpus_per_shard:
        return "no data sheet says how fast a CPU is; --bench takes what persona-ray bench --json has measured there"
    if job.shards.accelerator is None:
        return "the accelerator has no name; set shards.accelerator, or give --bench"
    return f"the data sheets are for bfloat16 and float16, not {job.model.dtype}; --bench takes what persona-ray bench --json has measured"


def measured_rates(path: Path) -> Rates:
    """From the JSON that `persona-ray bench --json` printed. Raises InputError if it is none.

    FLOP/s: tokens by second of our engine times the model's FLOPs for a token, by device. Bytes by second: as fast as all weights
    would be read once a step in the time that generation took; None if the benchmark generated nothing (--prompts 0).
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        settings, machine, capture = document["settings"], document["machine"], document["capture"][ENGINE]
        shares_one = settings["in_process"] and machine["device"] == "cuda"
        devices = 1 if shares_one else settings["stages"] * settings["tensor_parallel"]
        flops = float(capture["tokens_per_s"]) * float(document["model"]["flops_per_token"]) / devices
        generation = document.get("generation")
        read = None if generation is None else float(machine["copy_bandwidth"]) / float(generation["wall_over_bandwidth_limit"])
        return Rates(flops, read, f"measured on {machine['hardware']} with {document['model']['model_type']} ({path.name})")
    except OSError as error:
        raise InputError(f"--bench {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"--bench {path}: not what persona-ray bench --json prints ({type(error).__name__}: {error})") from error
