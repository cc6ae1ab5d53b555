"""`.pt` files, written and read without executing anything of them. The only file of the store that knows torch, and only once used."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import Float32, digest_of

if TYPE_CHECKING:
    from torch import Tensor

UNREADABLE = (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError, zipfile.BadZipFile)
"""What torch raises for files that are not its own, or damaged."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A file of named tensors, mapped rather than read: a tensor's bytes are read when it is used."""

    where: str
    tensors: Mapping[str, Tensor]

    def shape(self, key: str) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensors[key].shape)

    def is_bfloat16(self, key: str) -> bool:
        """Whether the tensor's values are bf16-exact by their type."""
        return str(self.tensors[key].dtype) == "torch.bfloat16"

    def float32(self, key: str) -> Float32:
        """The tensor's values, exact for what is narrower than float32."""
        return np.asarray(self.tensors[key].float().numpy())


def require_torch() -> None:
    """Raises InputError if torch is not installed."""
    try:
        import torch  # noqa: F401, PLC0415
    except ModuleNotFoundError as error:
        raise InputError(
            "torch is not installed, and the published layout is made of its files: pip install 'persona-ray[engine]'"
        ) from error


def save(file: Path, value: Any) -> None:
    """`torch.save`, of tensors, texts and numbers in dicts. NumPy arrays become tensors (uint16 ones bfloat16) without being copied."""
    import torch  # noqa: PLC0415

    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(_as_tensors(value), file)


def load(file: Path) -> Any:
    """What `file` holds: tensors, and plain values around them; mapped rather than read. Raises InputError if it cannot be read."""
    import torch  # noqa: PLC0415

    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise InputError(f"{file}: cannot be read as tensors ({reason or type(error).__name__})") from error


def as_float32(value: Any) -> Float32 | None:
    """A tensor of floating-point numbers, exact for what is narrower than float32; None for anything else."""
    import torch  # noqa: PLC0415

    is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
    return np.asarray(value.float().numpy()) if is_tensor else None


def load_tensors(file: Path) -> TensorFile:
    """The named tensors of `file`. Raises InputError if it holds anything else, or cannot be read."""
    import torch  # noqa: PLC0415

    found = load(file)
    is_named = isinstance(found, dict) and all(isinstance(key, str) for key in found)
    if not is_named or not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in found.values()):
        raise InputError(f"{file}: is not a file of activations, which maps pos_p0_q0 to a tensor of layers x hidden for each answer")
    return TensorFile(str(file), found)


def fingerprint(file: Path) -> str:
    """Digest of the file's parts by their sizes and check sums, as its own directory lists them: no tensor is read."""
    try:
        with zipfile.ZipFile(file) as parts:
            return digest_of(sorted([info.filename.partition("/")[2], info.file_size, info.CRC] for info in parts.infolist()))
    except (OSError, zipfile.BadZipFile):
        # The format before torch 1.6 has no directory.
        return digest_of([file.stat().st_size])


def _as_tensors(value: Any) -> Any:
    import torch  # noqa: PLC0415

    if isinstance(value, dict):
        return {key: _as_tensors(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        tensor = torch.from_numpy(value)
        return tensor.view(torch.bfloat16) if value.dtype == np.uint16 else tensor
    return value
