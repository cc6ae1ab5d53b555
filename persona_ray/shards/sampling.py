"""Drawing the next token, and where the random numbers come from.

A row's numbers depend on (seed, stream name, step) alone: not on the batch it is in, the worker, or a retry.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from persona_ray.spec import Float64, Sampling

CANDIDATES = 64
"""Tokens looked at before the whole vocabulary is sorted; a nucleus is rarely larger."""


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
    sorted_BN, token_BN = likeliest(probability_BV, sampling.top_p)
    above_BN = sorted_BN.cumsum(-1) - sorted_BN  # probability of everything that is likelier
    sorted_BN[above_BN >= sampling.top_p] = 0  # never the likeliest one: nothing is above it
    if sampling.top_k:
        sorted_BN[:, sampling.top_k :] = 0
    cumulative_BN = sorted_BN.cumsum(-1)
    target_B1 = uniform_B.double().unsqueeze(-1) * cumulative_BN[:, -1:]
    rank_B1 = (cumulative_BN <= target_B1).sum(-1, keepdim=True)
    last_kept_B1 = (sorted_BN > 0).sum(-1, keepdim=True) - 1  # rounding must not pick a token that was filtered out
    return token_BN.gather(-1, torch.minimum(rank_B1, last_kept_B1)).squeeze(-1)


def likeliest(probability_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens, which hold the nucleus of `top_p`: probabilities (B, N), falling, and token ids (B, N).

    Inside the nucleus equal to a stable sort of the whole vocabulary, which is made only where the candidates do not hold it: sorting
    costs more than the rest of the draw together. Beyond the nucleus entries may be zero.
    """
    num_candidates = min(CANDIDATES, probability_BV.shape[-1])
    values_BN, token_BN = probability_BV.topk(num_candidates, dim=-1)
    is_certain_BN = values_BN > values_BN[:, -1:]  # a tie with the last candidate may continue outside
    if num_candidates == probability_BV.shape[-1] or bool(((values_BN * is_certain_BN).sum(-1) < top_p).any()):
        sorted_BV, all_tokens_BV = torch.sort(probability_BV, dim=-1, descending=True, stable=True)
        return sorted_BV, all_tokens_BV
    token_BN, by_token_BN = token_BN.sort(dim=-1)
    values_BN, by_value_BN = (values_BN * is_certain_BN).gather(-1, by_token_BN).sort(dim=-1, descending=True, stable=True)
    return values_BN, token_BN.gather(-1, by_value_BN)
