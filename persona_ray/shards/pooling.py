"""The mean over the answer's tokens: one formula, one function."""

from __future__ import annotations

import torch
from torch import Tensor


def span_mask(start_B: Tensor, end_B: Tensor, num_tokens: int) -> Tensor:
    """True inside [start, end): (B, T), bool."""
    position_T = torch.arange(num_tokens, device=start_B.device)
    return (position_T >= start_B[:, None]) & (position_T < end_B[:, None])


def mean_over_span(hidden_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of `hidden` over the masked tokens, (B, D), float32; the sum runs in float32 whatever the model's dtype.

    A row without a token gives NaN, never a number: the guards behind it refuse that.
    """
    total_BD = torch.einsum("btd,bt->bd", hidden_BTD.float(), mask_BT.float())
    return total_BD / mask_BT.sum(1)[:, None]
