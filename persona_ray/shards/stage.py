"""One stage of the model in one process: plain torch, no Ray.

It runs its decoder blocks over a batch, and on the way it may edit the residual stream (steering) and pool it (capture).
What it is given is token ids on the first stage and hidden states on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from persona_ray.errors import RetryableError
from persona_ray.shards.cache import StageCache
from persona_ray.shards.load import load_stage
from persona_ray.shards.pooling import mean_over_span, span_mask
from persona_ray.shards.sampling import draw
from persona_ray.shards.transport import to_array, to_tensor
from persona_ray.spec import Edit, Float32, Float64, Int32, Sampling

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """Everything that a process needs to become a stage. Picklable."""

    location: str
    """Folder or hub name."""
    revision: str | None
    dtype: str
    attention: str
    first_layer: int
    end_layer: int
    num_layers: int
    captured: tuple[int, ...]
    """Layers to pool, of the whole model; this stage takes those that are its own."""
    device: str
    """cpu or cuda."""

    @property
    def is_first(self) -> bool:
        """Takes token ids."""
        return self.first_layer == 0

    @property
    def is_last(self) -> bool:
        """Has the final norm and the head, and draws tokens."""
        return self.end_layer == self.num_layers

    @property
    def own_captured(self) -> tuple[int, ...]:
        """Captured layers among this stage's blocks, ascending."""
        return tuple(layer for layer in self.captured if self.first_layer <= layer < self.end_layer)


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


class Stage:
    """A loaded stage."""

    def __init__(self, spec: StageSpec, num_threads: int = 1) -> None:
        torch.set_num_threads(num_threads)
        self.spec = spec
        self.device = torch.device(spec.device)
        self.model: Any = load_stage(
            spec.location,
            spec.first_layer,
            spec.end_layer,
            revision=spec.revision,
            dtype=spec.dtype,
            attention=spec.attention,
            device=spec.device,
        )
        self.base = getattr(self.model, self.model.base_model_prefix)
        self._after_block: Callable[[int, Tensor], Tensor] | None = None
        self._caches: dict[str, StageCache] = {}
        for layer in range(spec.first_layer, spec.end_layer):
            self.base.layers[layer].register_forward_hook(self._hook(layer))

    @property
    def hardware(self) -> str:
        """GPU name, or cpu."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    @torch.inference_mode()
    def capture(self, x: Array, start_B: Int32, end_B: Int32) -> tuple[Array, Float32]:
        """Hidden states to hand on (B, T, D), and the means over [start, end) of this stage's captured layers, (own L, B, D), float32.

        Sequences are padded on the right: under causal attention no real token sees a pad, so no mask is needed.
        """
        pooled_BD: dict[int, Tensor] = {}
        mask_BT = span_mask(torch.from_numpy(start_B.copy()), torch.from_numpy(end_B.copy()), x.shape[1]).to(self.device)
        own = set(self.spec.own_captured)

        def pool(layer: int, hidden_BTD: Tensor) -> Tensor:
            if layer in own:
                pooled_BD[layer] = mean_over_span(hidden_BTD, mask_BT)
            return hidden_BTD

        with self._watching(pool):
            hidden_BTD = self.base(**self._inputs(x), use_cache=False).last_hidden_state
        pooled_LBD = [pooled_BD[layer].cpu().numpy() for layer in self.spec.own_captured]
        stacked_LBD = np.stack(pooled_LBD) if pooled_LBD else np.empty((0, *x.shape[:1], hidden_BTD.shape[-1]), np.float32)
        return to_array(hidden_BTD), stacked_LBD

    @torch.inference_mode()
    def decode(self, step: DecodeStep, x: Array, uniform_B: Float64, sampling: Sampling, edits: Sequence[Edit]) -> Array:
        """One step of generation: hidden states (B, T, D), or the next token ids (B,), int64, on the last stage.

        Sequences are padded on the left. `uniform_B` holds one random number for each sequence.
        """
        cache = self._cache_for(step)
        total = step.past_length + x.shape[1]
        pad_B1 = torch.from_numpy(step.pad_B.copy()).to(self.device)[:, None]
        position_T = torch.arange(total, device=self.device)
        attention_mask_BT = (position_T >= pad_B1).long()
        inputs = {
            **self._inputs(x),
            "attention_mask": attention_mask_BT,
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
            if not self.spec.is_last:
                return to_array(self.base(**inputs).last_hidden_state)
            logits_BV = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
        return draw(logits_BV, torch.from_numpy(uniform_B.copy()).to(self.device), sampling).cpu().numpy()

    def drop(self, batch: str) -> None:
        """Free the batch's KV cache."""
        self._caches.pop(batch, None)

    def _inputs(self, x: Array) -> dict[str, Tensor]:
        return {"input_ids" if self.spec.is_first else "inputs_embeds": to_tensor(x, self.device)}

    def _cache_for(self, step: DecodeStep) -> StageCache:
        if step.past_length == 0:
            config = self.model.config.get_text_config(decoder=True)
            self._caches[step.batch] = StageCache(config, self.spec.first_layer, self.spec.end_layer)
        cache = self._caches.get(step.batch)
        if cache is None:
            raise RetryableError(
                f"layers [{self.spec.first_layer}, {self.spec.end_layer}): batch {step.batch} is not known here (restarted?)"
            )
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
