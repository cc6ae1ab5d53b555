"""Drawing the next token, and where the random numbers come from.

A row's numbers depend on (seed, stream name, step) alone: not on the batch it is in, the worker, or a retry.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from persona_ray.spec import Float64, Sampling


def uniform_stream(seed: int, stream: str, num_steps: int) -> Float64:
    """Uniform numbers in [0, 1), one per step, (num_steps,); a Philox generator keyed by a hash of seed and stream name."""
    key = hashlib.blake2b(f"{seed}\n{stream}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    return generator.random(num_steps)


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> Tensor:
    """Next token ids (B,), int64: greedy, or by inverse CDF over the tokens that top-k and top-p (nucleus) leave.

    The sums are float64, and equal probabilities keep the vocabulary's order, so that equal logits and numbers give equal tokens.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = torch.softmax(logits_BV.double() / sampling.temperature, -1)
    sorted_BV, token_BV = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
    above_BV = sorted_BV.cumsum(-1) - sorted_BV  # probability of everything that is likelier
    sorted_BV[above_BV >= sampling.top_p] = 0  # never the likeliest one: nothing is above it
    if sampling.top_k:
        sorted_BV[:, sampling.top_k :] = 0
    cumulative_BV = sorted_BV.cumsum(-1)
    target_B1 = uniform_B.double().unsqueeze(-1) * cumulative_BV[:, -1:]
    rank_B1 = (cumulative_BV <= target_B1).sum(-1, keepdim=True)
    last_kept_B1 = (sorted_BV > 0).sum(-1, keepdim=True) - 1  # rounding must not pick a token that was filtered out
    return token_BV.gather(-1, torch.minimum(rank_B1, last_kept_B1)).squeeze(-1)
