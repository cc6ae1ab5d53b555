"""What an estimate rests on: numbers that nobody can know beforehand, each with its source, each replaceable by whoever knows better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from persona_ray.config import Job
from persona_ray.errors import InputError
from persona_ray.shards.prices import LISTED, price_of
from persona_ray.store.expected import STORED_SHARE, is_bucket

ANSWER_SHARE = 435 / 512
"""Of `max_new_tokens`. Users of the published implementation measured about 435 tokens an answer of Qwen 3 32B at its limit of 512,
which 71 % of the answers reach (`RogerDOX14w/assistant-axis`)."""
ANSWER_TOKENS: Mapping[str, tuple[float, str]] = {"builtin:tiny-persona": (36, "measured: 600 rows of the quickstart")}
"""Models whose answers end by themselves: mean tokens, and how they are known."""
PREFILL_SHARE = 400 / 989
"""Of an accelerator's dense FLOP/s. 400 TFLOP/s is what good prefill reaches on an H100."""
DECODE_SHARE = 0.5
"""Of an accelerator's memory bandwidth, while weights and caches are read for one token after the other."""
PADDING = 0.03
"""Tokens computed for nothing beside those that are wanted: 2.4 to 3.6 % were measured (README)."""
JUDGE_TOKENS = 350
"""Of a rubric with its question, besides the answer: 260 million input tokens for 331,200 answers of 435 (the paper's judge)."""

CALLING = frozenset({"endpoint", "local"})
"""`judge.backend` that asks a model; the others look things up."""


@dataclass(frozen=True, slots=True)
class Assumption:
    """A number, and who says so."""

    value: float | None
    """None: nobody knows; what follows from it is not known either."""
    unit: str
    source: str


class Assumptions(Mapping[str, Assumption]):
    """By name, in a fixed order."""

    def __init__(self, by_name: Mapping[str, Assumption]) -> None:
        self._by_name = dict(by_name)

    def __getitem__(self, name: str) -> Assumption:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def value(self, name: str) -> float | None:
        """The number alone."""
        return self._by_name[name].value

    def number(self, name: str) -> float:
        """The number of one that always has one."""
        value = self._by_name[name].value
        assert value is not None, name
        return value

    def replaced(self, overrides: Sequence[str]) -> Assumptions:
        """With `name=value` in place of what is assumed here. Raises InputError for another name, or for no number of 0 or more."""
        given = dict(self._by_name)
        for override in overrides:
            name, equals, text = override.partition("=")
            if not equals or name not in given:
                raise InputError(f"--assume {override}: expected name=number; the names are {', '.join(given)}")
            given[name] = replace(given[name], value=_number(override, text), source="--assume")
        return Assumptions(given)


def _number(override: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise InputError(f"--assume {override}: {text or 'nothing'} is not a number") from error
    if not 0 <= value < float("inf"):
        raise InputError(f"--assume {override}: {text} is not a number of 0 or more")
    return value


def default_assumptions(job: Job) -> Assumptions:
    """What is assumed where nobody says otherwise."""
    price = price_of(job)
    storage = f"AWS S3 Standard, us-east-1, list price, {LISTED}"
    charged = is_bucket(job.store.url)

    def of_bucket(dollars: float, unit: str) -> Assumption:
        return Assumption(dollars, unit, storage) if charged else Assumption(0, unit, "a folder charges nothing")

    found = {
        "answer_tokens": _answer_tokens(job),
        "padding": Assumption(PADDING, "of all tokens", "measured: 2.4 to 3.6 % (README)"),
        "prefill_share": Assumption(PREFILL_SHARE, "of the data sheet's FLOP/s", "400 of an H100's 989 TFLOP/s; --bench measures"),
        "decode_share": Assumption(DECODE_SHARE, "of the data sheet's bytes/s", "a guess; --bench measures"),
        "stored_share": Assumption(STORED_SHARE[job.store.dtype], "of raw activations", "measured (README: stored size)"),
        "gpu_hour": Assumption(None, "$/h", f"no list price of {_hardware(job)} is known")
        if price is None
        else Assumption(price.per_gpu_hour, "$/h", price.source),
        "storage_gb_month": of_bucket(0.023, "$/GB/month"),
        "put_1000": of_bucket(0.005, "$ for 1,000"),
        "get_1000": of_bucket(0.0004, "$ for 1,000"),
    }
    if job.rollouts.source == "import":
        del found["decode_share"]
    return Assumptions(found | (_of_judge() if calls_somebody(job) else {}))


def calls_somebody(job: Job) -> bool:
    """Whether the job's judge asks another model, once for each row."""
    return job.judge.backend in CALLING


def _of_judge() -> dict[str, Assumption]:
    price = f"gpt-4.1-mini, list price, {LISTED}"
    return {
        "judge_prompt_tokens": Assumption(JUDGE_TOKENS, "tokens a call", "the paper's judge: 785 with an answer of 435"),
        "judge_answer_tokens": Assumption(10, "tokens a call", "the published code's limit"),
        "judge_input_million": Assumption(0.40, "$ for 1,000,000 tokens", price),
        "judge_output_million": Assumption(1.60, "$ for 1,000,000 tokens", price),
    }


def _hardware(job: Job) -> str:
    return "a CPU" if not job.shards.gpus_per_shard else job.shards.accelerator or "a GPU without a name (shards.accelerator)"


def _answer_tokens(job: Job) -> Assumption:
    unit, limit = "tokens an answer", job.rollouts.max_new_tokens
    if job.rollouts.source == "import":
        return Assumption(None, unit, "those of the imported text")
    if job.model.id in ANSWER_TOKENS:
        tokens, source = ANSWER_TOKENS[job.model.id]
        return Assumption(min(tokens, limit), unit, source)
    return Assumption(
        round(ANSWER_SHARE * limit, 1), unit, f"85 % of max_new_tokens {limit}: Qwen 3 32B took 435 of 512, as users measured"
    )
