"""bfloat16 for zarr-python, which does not know it, under the name and in the bytes of TensorStore.

A store with `store.dtype: bfloat16` opens in plain zarr and in xarray once this module is imported:

    import persona_ray.store.bfloat16

TensorStore needs nothing. Before computing, convert by `.astype("float32")`: xarray refuses to reduce such values, and NumPy sums
them in bfloat16. Our own readers import this themselves, and answer float32. It needs zarr and ml_dtypes alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt
from zarr.core.dtype.common import DataTypeValidationError
from zarr.core.dtype.npy.float import BaseFloat
from zarr.dtype import data_type_registry

NAME = "bfloat16"
NATIVE = np.dtype(ml_dtypes.bfloat16)
LARGEST_ROUNDED = np.array(0x7F7F7FFF, dtype=np.uint32).view(np.float32)[()]
"""The largest float32 that does not become infinite as bfloat16, to which it is rounded to nearest, ties to even."""


@dataclass(frozen=True, kw_only=True)
class BFloat16(BaseFloat[Any, Any]):
    """The data type. Fill values are written as those of other floats: numbers, "NaN", "Infinity"."""

    dtype_cls = type(NATIVE)
    _zarr_v3_name: ClassVar[str] = NAME
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _check_native_dtype(cls, dtype: Any) -> bool:  # type: ignore[override]  # zarr wants a type guard of its own dtypes
        return bool(dtype == NATIVE)

    @classmethod
    def from_native_dtype(cls, dtype: Any) -> BFloat16:
        """Raises DataTypeValidationError for any other: that is how zarr asks its types in turn."""
        if not cls._check_native_dtype(dtype):
            raise DataTypeValidationError(f"{dtype} is not bfloat16")
        return cls()

    def to_native_dtype(self) -> Any:
        """The dtype of ml_dtypes, which knows no byte order but the machine's. Raises ValueError for an array in the other one."""
        if self.endianness != sys.byteorder:
            raise ValueError(f"{self.endianness}-endian bfloat16 cannot be read on this {sys.byteorder}-endian machine; use TensorStore")
        return NATIVE

    @property
    def item_size(self) -> int:
        """Bytes of a value."""
        return int(NATIVE.itemsize)


def widened(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bfloat16 values as float32, which holds them all; anything else as it is."""
    return values.astype(np.float32) if values.dtype == NATIVE else values


data_type_registry.register(NAME, BFloat16)
