"""Two ways from the same rows to an axis, by name: the paper's, and what the code released with it does.

`paper`: float64 from the stored rows to the end. `published-code`: every mean and the subtraction rounded to bfloat16
(safety-research/assistant-axis, steps 4 and 5), which costs the axis about 1 % of its length; for comparing with published vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from persona_ray.spec import Float64

Rounding = Callable[[Float64], Float64]


def rounding_of(preset: str) -> Rounding:
    """What is done to every mean and difference on the way."""
    return to_bfloat16 if preset == "published-code" else unrounded


def to_bfloat16(values: Float64) -> Float64:
    """The nearest bfloat16 of each, as float64. By way of float32, as PyTorch's means in bfloat16 go."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def unrounded(values: Float64) -> Float64:
    """As they are."""
    return values
