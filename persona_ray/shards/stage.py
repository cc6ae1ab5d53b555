"""One stage of the model in one process: plain torch, no Ray.

It runs its decoder blocks over a batch, and on the way it may edit the residual stream (steering) and pool it (capture).
What it is given is token ids on the first stage and hidden states on the others.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from persona_ray.errors import OutOfMemoryError, RetryableError
from persona_ray.metrics import GPU_MEMORY_BYTES, STAGE_BUSY_SECONDS, record
from persona_ray.shards.cache import StageCache
from persona_ray.shards.fetch import fetch_stage
from persona_ray.shards.plan import StageSpec
from persona_ray.shards.pooling import mean_over_span
from persona_ray.shards.sampling import draw
from persona_ray.shards.transport import Array, HostCopy, to_tensor
from persona_ray.spec import Edit, Float32, Float64, Int32, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

T = TypeVar("T")
Hidden = Array | Tensor
"""Token ids or hidden states, on the host or on a device."""

MEMORY_EVERY_S = 2.0
"""How often it is recorded: asking the allocator costs as much as a small kernel."""


@dataclass(frozen=True, slots=True)
class Rank:
    """Which tensor-parallel rank of its stage a process is, and where the ranks meet. They are always on one node."""

    number: int
    port: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One forward of a batch that is being generated, the same for every stage."""

    batch: str
    """Names the KV cache."""
    past_length: int
    """Padded tokens already in the cache; 0 begins a batch."""
    pad_B: Int32
    """Left padding of each sequence, after `keep`."""
    keep: tuple[int, ...] | None
    """Sequences of the cache that go on; None = all."""


class _CaptureIsDone(Exception):  # noqa: N818  # no error
    """Raised by the hook of the last captured block: what comes after it would be computed for nothing."""


class Stage:
    """A loaded stage. Safe to use from several threads: batches take turns on the device, and results are waited for outside of that."""

    def __init__(self, spec: StageSpec, *, rank: Rank | None = None, hands_on_tensors: bool = False) -> None:
        """`hands_on_tensors`: hidden states stay on the device, for a direct transport or a neighbour in the same process."""
        # More threads cut sums in other places: a row's bits would depend on the number of cores. Stages and replicas use those.
        torch.set_num_threads(1)
        self.spec = spec
        self._hands_on_tensors = hands_on_tensors
        self.device = torch.device(spec.device)
        if rank is not None:  # read when the weights are loaded, which opens the process group
            os.environ.update(RANK=str(rank.number), WORLD_SIZE=str(spec.tensor_parallel), LOCAL_RANK="0")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(rank.port))
        # Only who holds a shard pays seconds for the library's modelling code; drivers and replicas import this module, too.
        from persona_ray.shards.load import load_stage  # noqa: PLC0415

        first, end = spec.first_layer, spec.end_layer
        self.model: Any = load_stage(
            str(fetch_stage(spec.location, spec.revision, first, end, with_head=spec.has_head)),
            first,
            end,
            revision=None,
            dtype=spec.dtype,
            attention=spec.attention,
            device=spec.device,
            with_head=spec.has_head,
            tensor_parallel=spec.tensor_parallel,
        )
        self.base = getattr(self.model, self.model.base_model_prefix)
        self._after_block: Callable[[int, Tensor], Tensor] | None = None
        self._caches: dict[str, StageCache] = {}
        self._turn = threading.Lock()
        self._busy_s, self._free_at, self._told_memory_at = 0.0, 0.0, 0.0
        for layer in range(first, end):
            self.base.layers[layer].register_forward_hook(self._hook(layer))

    @property
    def hardware(self) -> str:
        """GPU name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def usage(self) -> Mapping[str, float]:
        """What this process took so far: seconds that the stage was busy, CPU seconds, peak bytes of host and device memory."""
        used = resource.getrusage(resource.RUSAGE_SELF)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return {
            "busy_s": self._busy_s,
            "cpu_s": used.ru_utime + used.ru_stime,
            "peak_host_bytes": used.ru_maxrss * 1024,
            "peak_device_bytes": peak,
        }

    def capture(self, x: Hidden, start_B: Int32, end_B: Int32) -> tuple[Hidden | None, Float32]:
        """Hidden states to hand on (B, T, D), None where capture ends, and the means over [start, end) of the own captured layers.

        The means are (own L, B, D), float32. Sequences are padded on the right: under causal attention no real token sees
        a pad, so no mask is needed. Raises OutOfMemoryError.
        """
        began = time.perf_counter()
        with self._turn:
            hidden_BTD, means_LBD = self._within_memory(lambda: self._capture(x, start_B, end_B), x)
            handed_on = None if hidden_BTD is None else self._hand_on(hidden_BTD)
            arriving_LBD = HostCopy(means_LBD)
        output = _arrived(handed_on), arriving_LBD.wait()
        self._note_busy(began)
        return output

    @torch.inference_mode()
    def _capture(self, x: Hidden, start_B: Int32, end_B: Int32) -> tuple[Tensor | None, Tensor]:
        own = self.spec.own_captured
        pooled_BD: dict[int, Tensor] = {}

        def pool(layer: int, hidden_BTD: Tensor) -> Tensor:
            if layer in own:
                pooled_BD[layer] = mean_over_span(hidden_BTD, start_B, end_B)
                if self.spec.ends_capture and layer == own[-1]:
                    raise _CaptureIsDone
            return hidden_BTD

        hidden_BTD: Tensor | None = None
        with self._watching(pool), suppress(_CaptureIsDone):
            hidden_BTD = self.base(**self._inputs(x), use_cache=False).last_hidden_state
        if not own:
            return hidden_BTD, torch.empty(0, len(start_B), self.base.config.hidden_size)
        return hidden_BTD, torch.stack([pooled_BD[layer] for layer in own])

    def decode(self, step: DecodeStep, x: Hidden, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> Hidden:
        """One step of generation: hidden states (B, T, D), or the next token ids (B,), int64, from the stage with the head.

        Sequences are padded on the left. `uniform_B` holds one random number for each sequence. Raises OutOfMemoryError, and
        RetryableError for a batch that this process does not know.
        """
        began = time.perf_counter()
        with self._turn:
            output = self._within_memory(lambda: self._decode(step, x, uniform_B, sampling, edits), x)
            handed_on = HostCopy(output) if self.spec.has_head else self._hand_on(output)
        arrived: Hidden = _arrived(handed_on)
        self._note_busy(began)
        return arrived

    @torch.inference_mode()
    def _decode(self, step: DecodeStep, x: Hidden, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> Tensor:
        cache = self._cache_for(step)
        total = step.past_length + x.shape[1]
        pad_B1 = torch.from_numpy(step.pad_B.copy()).to(self.device)[:, None]
        position_T = torch.arange(total, device=self.device)
        inputs = {
            **self._inputs(x),
            "attention_mask": (position_T >= pad_B1).long(),
            "position_ids": (position_T[step.past_length :] - pad_B1).clamp_min(0),
            "past_key_values": cache,
            "use_cache": True,
        }

        def steer(layer: int, hidden_BTD: Tensor) -> Tensor:
            for edit in edits:
                if edit.layer == layer:
                    hidden_BTD = edit(hidden_BTD)
            return hidden_BTD

        with self._watching(steer):
            if not self.spec.has_head:
                hidden_BTD: Tensor = self.base(**inputs).last_hidden_state
                return hidden_BTD
            logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return draw(logits_BV, torch.from_numpy(uniform_B.copy()).to(self.device), sampling)

    def drop(self, batch: str) -> None:
        """Free the batch's KV cache."""
        self._caches.pop(batch, None)

    def _hand_on(self, hidden_BTD: Tensor) -> Tensor | HostCopy:
        return hidden_BTD if self._hands_on_tensors else HostCopy(hidden_BTD)

    def _within_memory(self, forward: Callable[[], T], x: Hidden) -> T:
        try:
            return forward()
        except torch.OutOfMemoryError:
            pass  # raised below, where the traceback no longer holds the tensors that did not fit
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemoryError(f"{self.spec.name}: a batch of {x.shape[0]} x {x.shape[1]} tokens does not fit into the device's memory")

    def _note_busy(self, began: float) -> None:
        """Seconds at work; overlapping batches are counted once."""
        ended = time.perf_counter()
        busy_s = ended - max(began, self._free_at)
        self._busy_s += busy_s
        self._free_at = ended
        record(STAGE_BUSY_SECONDS, busy_s)
        if self.device.type == "cuda" and ended - self._told_memory_at > MEMORY_EVERY_S:
            self._told_memory_at = ended
            record(GPU_MEMORY_BYTES, torch.cuda.memory_allocated(self.device), kind="allocated")
            record(GPU_MEMORY_BYTES, torch.cuda.max_memory_allocated(self.device), kind="peak")

    def _inputs(self, x: Hidden) -> dict[str, Tensor]:
        return {"input_ids" if self.spec.is_first else "inputs_embeds": to_tensor(x, self.device)}

    def _cache_for(self, step: DecodeStep) -> StageCache:
        if step.past_length == 0:
            config = self.model.config.get_text_config(decoder=True)
            self._caches[step.batch] = StageCache(config, self.spec.first_layer, self.spec.end_layer)
        cache = self._caches.get(step.batch)
        if cache is None:
            raise RetryableError(f"{self.spec.name}: batch {step.batch} is not known here (restarted?)")
        if step.keep is not None:
            cache.keep(list(step.keep))
        return cache

    def _hook(self, layer: int) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if self._after_block is None:
                return None
            if isinstance(output, tuple):
                return (self._after_block(layer, output[0]), *output[1:])
            return self._after_block(layer, output)

        return hook

    @contextmanager
    def _watching(self, after_block: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
        self._after_block = after_block
        try:
            yield
        finally:
            self._after_block = None


def _arrived(output: Tensor | HostCopy | None) -> Any:
    return output.wait() if isinstance(output, HostCopy) else output
