"""The golden data that PERSONA_RAY_CONFORMANCE names, and how far from them a vector is.

The data are conformance material only: nothing of them is, or may be, part of this repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def golden_folder() -> Path:
    root = os.environ.get("PERSONA_RAY_CONFORMANCE")
    if not root:
        pytest.skip(
            "PERSONA_RAY_CONFORMANCE is not set: it names the folder that holds llama3-tiny/, golden data of the published implementation"
        )
    folder = Path(root) / "llama3-tiny"
    if not (folder / "golden.npz").is_file():
        pytest.skip(f"{folder} holds no golden.npz")
    return folder


@pytest.fixture(scope="session")
def golden(golden_folder: Path) -> dict[str, np.ndarray]:
    with np.load(golden_folder / "golden.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def relative(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Relative L2 error of each vector (last dim)."""
    return np.linalg.norm(found.astype(np.float64) - expected, axis=-1) / np.linalg.norm(expected.astype(np.float64), axis=-1)
