"""The exports by name, for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from persona_ray.errors import InputError
from persona_ray.spec import ProgressCallback
from persona_ray.store.exchange.dataset import export_dataset
from persona_ray.store.exchange.icechunk import export_icechunk
from persona_ray.store.exchange.published import export_published
from persona_ray.store.exchange.target import Exported
from persona_ray.store.exchange.tensors import export_safetensors
from persona_ray.store.reader import StoreReader


def export_store(store: StoreReader, folder: Path, layout: str, layers: Sequence[int] | None, progress: ProgressCallback) -> Exported:
    """Write `store` to `folder` as "published", "safetensors", "dataset" or "icechunk". Raises InputError for any other name."""
    match layout:
        case "published":
            return export_published(store, folder, layers=layers, progress=progress)
        case "safetensors":
            return export_safetensors(store, folder, layers=layers)
        case "dataset":
            return export_dataset(store, folder, layers=layers or (), progress=progress)
        case "icechunk":
            return export_icechunk(store, folder, layers=layers, progress=progress)
    raise InputError(f"{layout}: no such export; there are published, safetensors, dataset and icechunk")
