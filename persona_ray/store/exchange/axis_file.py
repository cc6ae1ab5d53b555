"""An axis, or a principal component, from a file that was handed around: our own safetensors export, or the published layout's `.pt`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import Float32
from persona_ray.store.exchange.torch_files import as_float32, load, require_torch

SUFFIXES = frozenset({".safetensors", ".pt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisFile:
    """What the file says; all float32."""

    layers: tuple[int, ...]
    """Decoder blocks of the first dim."""
    are_layers_named: bool
    """False: the file does not say, and they are counted from 0."""
    vector_LD: Float32
    default_vector_LD: Float32 | None
    """Mean activation of the default Assistant; None: not in the file."""
    model_id: str | None


def is_axis_file(reference: str) -> bool:
    """Whether this is the name of such a file, and not that of a store."""
    return Path(reference).suffix in SUFFIXES


def read_axis_file(file: str | Path, component: int | None = None) -> AxisFile:
    """The axis of `file`, or its principal component number `component` (1 is PC1).

    `.safetensors`: tensors `axis` and `default_vector` (axis.safetensors of `store export`) or `pc_1`, `pc_2` ... (pca.safetensors).
    `.pt`: one tensor, as assistant_axis.pt is, or a dict with `axis` and perhaps `default_mean` (axis.pt); never unpickled.
    Raises InputError for a file without it, or one that cannot be read.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise InputError(f"{file}: there is no such file")
    name = "axis" if component is None else f"pc_{component}"
    tensors, metadata = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    if name not in tensors:
        hint = "; components are in pca.safetensors of the same export" if component else ""
        raise InputError(f"{file}: has no {name}; there are {', '.join(sorted(tensors)) or 'no tensors'}{hint}")
    vector_LD, default_LD = tensors[name], None if component else tensors.get("default_vector", tensors.get("default_mean"))
    layers = metadata.get("layers")
    found = AxisFile(
        layers=tuple(range(len(vector_LD))) if layers is None else tuple(json.loads(layers)),
        are_layers_named=layers is not None,
        vector_LD=vector_LD,
        default_vector_LD=default_LD,
        model_id=metadata.get("model_id") or None,
    )
    _check(str(file), name, found)
    return found


def _safetensors(path: Path) -> tuple[dict[str, Float32], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open  # noqa: PLC0415

    try:
        with safe_open(path, framework="np") as file:
            tensors = {name: np.asarray(file.get_tensor(name), dtype=np.float32) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, TypeError) as error:
        raise InputError(f"{path}: cannot be read as safetensors ({error})") from error


def _torch(path: Path) -> tuple[dict[str, Float32], Mapping[str, str]]:
    """Whatever else a dict holds is left alone."""
    require_torch()
    found: Any = load(path)
    named = found if isinstance(found, dict) else {"axis": found}
    tensors = {str(name): as_float32(value) for name, value in named.items()}
    return {name: values for name, values in tensors.items() if values is not None}, {}


def _check(where: str, name: str, found: AxisFile) -> None:
    shape = found.vector_LD.shape
    if len(shape) != 2 or len(found.layers) != shape[0] or not np.isfinite(found.vector_LD).all():
        raise InputError(f"{where}: {name} is {shape}; expected finite numbers, (layers, hidden), one line for each of its layers")
    if found.default_vector_LD is not None and found.default_vector_LD.shape != shape:
        raise InputError(f"{where}: the default vector is {found.default_vector_LD.shape}, and {name} is {shape}")
