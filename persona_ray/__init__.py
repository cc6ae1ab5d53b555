"""persona_ray: extract the persona space of a large language model over many GPUs.

`open_store(url)` reads what a run has written. Everything heavy is imported on first use, so that `import persona_ray`
costs nothing on a laptop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persona_ray.store.reader import StoreReader

__version__ = "0.1.0"
__all__ = ["__version__", "open_store"]


def open_store(url: str, at: str | None = None) -> StoreReader:
    """The store at `url`, read-only and lazily; `at`: as it was when its ledger had that digest. Raises InputError if there is none."""
    from persona_ray.store.reader import open_store as open_reader

    return open_reader(url, at)
