"""The scripts of `jobs/`, which are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

JOBS = Path(__file__).parents[2] / "jobs"


def script(name: str) -> ModuleType:
    """`jobs/{name}.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look there for their annotations
    spec.loader.exec_module(module)
    return module
