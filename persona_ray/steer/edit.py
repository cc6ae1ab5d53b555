"""Edits of the residual stream. Pure: hidden states in, hidden states out; who hooks them into a model is not known here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from persona_ray.errors import InputError
from persona_ray.spec import Float32
from persona_ray.steer.direction import multiple, random_direction


@dataclass(frozen=True, slots=True, eq=False)
class AddVector:
    """h + v after decoder block `layer`, at every token position (Lu et al. 2026, section 3.2).

    Edits of one layer add up, in any order; a zero vector changes nothing. Pickles, so it can be sent to other processes.
    """

    layer: int
    vector_D: Float32

    def __post_init__(self) -> None:
        """Raises InputError if the vector cannot be added to any hidden state."""
        if self.vector_D.ndim != 1 or not np.isfinite(self.vector_D).all():
            shape = self.vector_D.shape
            raise InputError(
                f"a steering vector is one finite number for each dim, (hidden,); this one is {shape}, or has NaN or Inf in it"
            )

    def __call__(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Returns h + v in h's dtype and device. Raises InputError if the widths differ."""
        if (width := hidden_BTD.shape[-1]) != len(self.vector_D):
            raise InputError(
                f"the steering vector for layer {self.layer} has {len(self.vector_D)} dims, the model's residual stream {width}"
            )
        return hidden_BTD + torch.tensor(self.vector_D, dtype=hidden_BTD.dtype, device=hidden_BTD.device)


def along(axis_D: Float32, layer: int, strength: float) -> AddVector:
    """Steers by `strength` x axis: positive toward the Assistant, negative away, 0 not at all."""
    return AddVector(layer, multiple(axis_D, strength))


def random_like(axis_D: Float32, layer: int, strength: float, seed: int) -> AddVector:
    """Steers by a random direction of the norm of `strength` x axis: what any push of this size does."""
    return AddVector(layer, multiple(random_direction(axis_D, seed), strength))
