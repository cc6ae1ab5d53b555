"""The heavy steps of the components of single rollouts on a GPU, in float64: in tasks that were given one, and nowhere else.

Torch is loaded then only. `device` is there for tests: the same steps on a CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from persona_ray.spec import Float64

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class _Process:
    has_gpu = False


def is_given() -> bool:
    """Whether this process computes on a GPU now. The environment does not say: a GPU that can be seen may be the model's."""
    return _Process.has_gpu


@contextmanager
def given() -> Iterator[None]:
    """While the `with` block lasts, for a task that has reserved a GPU. Where torch finds none, the CPU computes, and the log says so."""
    _Process.has_gpu = _is_found()
    if not _Process.has_gpu:
        log.warning("a GPU is reserved, and torch finds none: components are computed on the CPU")
    try:
        yield
    finally:
        _Process.has_gpu = False


def _is_found() -> bool:
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
