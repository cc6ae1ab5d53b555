"""The heavy steps of the components of single rollouts on a GPU, in float64: where Ray has given this process one.

Torch is loaded then only. `device` is there for tests: the same steps on a CPU.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from persona_ray.spec import Float64

if TYPE_CHECKING:
    import torch


@cache
def is_given() -> bool:
    """Whether Ray has reserved a GPU for this process (it names them in CUDA_VISIBLE_DEVICES, and none by an empty name)."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return False
    try:
        import torch  # noqa: PLC0415
    except ModuleNotFoundError:
        return False
    return torch.cuda.is_available()


def leading(factor_LMD: Float64, number: int, device: str = "cuda") -> Float64:
    """`incremental.leading` of every layer at once: (L, number, D), or (L, M, D) if there are fewer."""
    factor = _there(factor_LMD, device)
    num_rows, width = factor.shape[1:]
    if num_rows <= width:
        _, vectors = _eigh(factor @ factor.mT)
        return _back(vectors.flip(-1)[..., :number].mT @ factor)
    values, vectors = _eigh(factor.mT @ factor)
    lengths = values.flip(-1)[:, :number].clamp(min=0).sqrt()
    return _back(lengths[..., None] * vectors.flip(-1)[..., :number].mT)


def scatter(centred_LRD: Float64, device: str = "cuda") -> Float64:
    """X^T X at every layer: (L, D, D)."""
    rows = _there(centred_LRD, device)
    return _back(rows.mT @ rows)


def _there(values: Float64, device: str) -> torch.Tensor:
    import torch  # noqa: PLC0415

    return torch.from_numpy(values).to(device)


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    import torch  # noqa: PLC0415

    found = torch.linalg.eigh(symmetric)
    return found.eigenvalues, found.eigenvectors


def _back(values: torch.Tensor) -> Float64:
    numbers: Float64 = values.cpu().numpy()
    return numbers
