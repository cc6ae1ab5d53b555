"""The result in force as safetensors with a model card: what a steering or probing tool loads in one line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from persona_ray.errors import InputError
from persona_ray.spec import Float32, Reduced
from persona_ray.store.exchange.cards import identity_digest, vectors_card
from persona_ray.store.exchange.result import result_in_force, role_vectors
from persona_ray.store.exchange.target import Exported, files_in, new_folder
from persona_ray.store.exchange.view import view_of
from persona_ray.store.layout import layer_aliases
from persona_ray.store.reader import StoreReader

SIGN = "axis = default_vector - mean of role vectors: higher projection = more Assistant-like; pc_1 points to the Assistant"


def export_safetensors(store: StoreReader, folder: str | Path, *, layers: Sequence[int] | None = None) -> Exported:
    """The axis, default and role vectors and principal components of the result in force, each [layers, hidden] float32.

    `axis.safetensors`: axis, default_vector, cos_pc1_axis [layers]; `role_vectors.safetensors`: one tensor for each archetype;
    `pca.safetensors`: pc_1, pc_2, ..., explained_variance_ratio [layers, components]; and `README.md`. The first dim follows
    the metadata's `layers`.
    Raises InputError if nothing is reduced yet, for a layer that the result does not have, and if `folder` is not new or empty.
    """
    if find_spec("safetensors") is None:
        raise InputError("safetensors is not installed: pip install 'persona-ray[exchange]'")
    reduced = result_in_force(store, layers)
    if reduced is None:
        raise InputError(f"{store.url}: nothing is reduced yet, so there is no axis to export; `persona-ray run JOB` makes it")
    view = view_of(store)
    metadata = _metadata(store, reduced)
    with new_folder(folder) as draft:
        for name, tensors in _files(reduced).items():
            _save(draft / name, tensors, metadata)
        (draft / "README.md").write_text(vectors_card(store, reduced, SIGN), encoding="utf-8")
        files = files_in(draft)
    rows = int(reduced.attributes.get("num_rows", 0))
    refused = sum(len(marker.refused) for marker in view.markers.values())
    left_out = {"refused": refused} if refused else {}
    return Exported(folder=str(folder), files=files, rows=rows, left_out=left_out, ledger_digest=str(metadata["ledger_digest"]))


def _files(reduced: Reduced) -> dict[str, dict[str, Float32]]:
    components = {f"pc_{k + 1}": reduced.pca_components_LKD[:, k] for k in range(reduced.pca_components_LKD.shape[1])}
    return {
        "axis.safetensors": {
            "axis": reduced.axis_LD,
            "default_vector": reduced.default_vector_LD,
            "cos_pc1_axis": reduced.cos_pc1_axis_L,
        },
        "role_vectors.safetensors": role_vectors(reduced),
        "pca.safetensors": {**components, "explained_variance_ratio": reduced.pca_explained_variance_ratio_LK},
    }


def _metadata(store: StoreReader, reduced: Reduced) -> dict[str, str]:
    """Strings, as the format wants them."""
    identity, attributes = store.identity, reduced.attributes
    return {
        "format": "pt",
        "layers": json.dumps(list(reduced.layers)),
        **layer_aliases(),
        "model_id": str(identity["model_id"]),
        "model_revision": str(identity["model_revision"] or ""),
        "identity_digest": identity_digest(store),
        "ledger_digest": str(attributes.get("ledger_digest", "")),
        "result": reduced.name,
        "filter": str(attributes.get("filter", "")),
        "judge": str(attributes.get("judge") or ""),
        "sign": SIGN,
    }


def _save(file: Path, tensors: Mapping[str, Float32], metadata: dict[str, str]) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415

    save_file({name: np.ascontiguousarray(values, dtype=np.float32) for name, values in tensors.items()}, str(file), metadata=metadata)
