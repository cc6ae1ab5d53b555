"""From a model's size to GPU-seconds. Each formula once; pure.

A replica's stages work as a pipeline, so each batch costs the whole replica as long as its slowest stage takes, and GPU-seconds
are that times the replica's GPUs. Prefill computes (FLOPs over FLOP/s). Decoding reads: at each step the stage's weights once for
the batch, and the caches of its conversations; with many of them it computes as long as it reads, and the longer one counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from persona_ray.shards.cut import Cut, stage_flops
from persona_ray.shards.size import ModelSize


@dataclass(frozen=True, slots=True)
class Rates:
    """What one GPU does in a second, in earnest."""

    flops: float
    """Of prefill."""
    bytes: float | None
    """Read while decoding; None: not known."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """How long conversations are, on average, in tokens."""

    number: int
    prompt_tokens: float
    answer_tokens: float

    @property
    def tokens(self) -> float:
        """Of one conversation."""
        return self.prompt_tokens + self.answer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One copy of the model, as far as its speed goes."""

    size: ModelSize
    cut: Cut
    captured: tuple[int, ...]
    dtype_bytes: int
    unit_rows: int
    decode_tokens: int
    """Of a batch that is being generated: prompts, and answers as long as they may be."""
    max_new_tokens: int

    @property
    def num_shards(self) -> int:
        """GPUs, if each shard has one."""
        return self.cut.num_shards


def prefill_flops(replica: Replica, rows: Rows) -> float:
    """Of capturing all rows: a causal prefill of prompt and answer up to the last captured block, no head. FLOPs of all stages."""
    blocks = replica.size.blocks[: max(replica.captured) + 1]
    return rows.number * rows.tokens * sum(block.flops(round(rows.tokens)) for block in blocks)


def capture_gpu_s(replica: Replica, rows: Rows, rates: Rates, padding: float) -> float:
    """GPU-seconds of that; `padding`: tokens computed for nothing, beside those that are wanted."""
    end = max(replica.captured) + 1
    return _prefill_gpu_s(replica, rows.number * rows.tokens * (1 + padding), round(rows.tokens), rates, end)


def generation_gpu_s(replica: Replica, rows: Rows, rates: Rates, padding: float) -> float | None:
    """GPU-seconds of reading the prompts and drawing the answers; None where the speed of reading is not known.

    A unit is answered in batches of as many rows as the cache holds, each for `max_new_tokens` steps: of so many rows one is
    likely to take them all. Rows that have ended leave their batch, so caches are read for tokens that are really drawn.
    """
    if rates.bytes is None:
        return None
    per_batch = max(1, min(replica.unit_rows, int(replica.decode_tokens // (rows.prompt_tokens + replica.max_new_tokens))))
    batches = -(-replica.unit_rows // per_batch)
    steps = replica.max_new_tokens * batches * rows.number / replica.unit_rows
    drawn = rows.number * rows.answer_tokens
    context = rows.prompt_tokens + rows.answer_tokens / 2
    seconds = 0.0
    for stage in replica.cut.stages:
        cached = sum(_cache_bytes_per_token(replica, layer) for layer in range(stage.first_layer, stage.end_layer))
        read = steps * stage.weight_bytes + drawn * context * cached
        layers = (stage.first_layer, stage.end_layer)
        computed = drawn * stage_flops(
            replica.size, layers, with_head=True, context=round(rows.tokens), tensor_parallel=replica.cut.tensor_parallel
        )
        seconds = max(seconds, read / rates.bytes, computed / rates.flops)
    prompts = rows.number * rows.prompt_tokens * (1 + padding)
    return seconds * replica.num_shards + _prefill_gpu_s(replica, prompts, round(rows.prompt_tokens), rates, replica.size.num_layers)


def _prefill_gpu_s(replica: Replica, tokens: float, context: int, rates: Rates, end: int) -> float:
    """Of `tokens` in conversations of `context` tokens, through the blocks before `end`: the slowest stage's time on all GPUs."""
    slowest = max(
        stage_flops(
            replica.size,
            (stage.first_layer, min(stage.end_layer, end)),
            with_head=False,
            context=max(1, context),
            tensor_parallel=replica.cut.tensor_parallel,
        )
        for stage in replica.cut.stages
        if stage.first_layer < end
    )
    return tokens * slowest / rates.flops * replica.num_shards


def _cache_bytes_per_token(replica: Replica, layer: int) -> float:
    """On each GPU of the stage; ranks of tensor parallelism share no head of the cache."""
    block = replica.size.blocks[layer]
    return block.cache_width * replica.dtype_bytes / min(replica.cut.tensor_parallel, block.num_cache_heads)
