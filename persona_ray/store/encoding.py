"""Array values to object bytes and back, in memory: units by `blocks`, metadata and everything else by zarr.

The bytes are then created by a `Backend`. So no array handle is ever open for writing: nothing depends on a shape that
another process may have changed, and zarr can neither overwrite nor delete.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from persona_ray.errors import IntegrityError
from persona_ray.store.backend import METADATA_NAME
from persona_ray.store.bfloat16 import widened
from persona_ray.store.blocks import decode_chunk, decode_shard, encode_chunk, encode_shard
from persona_ray.store.layout import ArraySpec

COMPRESSORS = (BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle"), Crc32cCodec())
"""The check sum comes last: a flipped bit is an error in every reader, not a number."""


def array_objects(spec: ArraySpec, values: npt.NDArray[np.generic] | None = None) -> dict[str, bytes]:
    """Objects of an array by key, chunks first and metadata last; without `values` the metadata alone."""
    memory: dict[str, Buffer] = {}
    # Otherwise a chunk of fill values alone would be dropped, and a marker could not list it.
    array = zarr.create_array(MemoryStore(memory), **zarr_arguments(spec), config={"write_empty_chunks": True})
    if values is not None:
        array[...] = values
    keys = sorted(memory, key=lambda key: (key == METADATA_NAME, key))
    return {f"{spec.name}/{key}": memory[key].to_bytes() for key in keys}


def encode_unit(spec: ArraySpec, values: npt.NDArray[np.generic], *, is_rounded: bool = False) -> bytes:
    """The one object that holds a unit of `spec`, or a chunk of planned rows; the first dim of `values` is whole, padding included.

    `is_rounded`: whatever the array's dtype, its values are such as bfloat16 holds; `values` are rounded to it, to nearest, ties to even.
    """
    if spec.shards is not None:
        return encode_shard(values, spec.dtype, is_rounded=is_rounded and spec.dtype == "float32")
    return encode_chunk(np.ascontiguousarray(values, dtype=np.dtype(spec.dtype)))


def array_document(spec: ArraySpec) -> bytes:
    """`zarr.json` of an array."""
    return array_objects(spec)[f"{spec.name}/{METADATA_NAME}"]


def decode_unit(spec: ArraySpec, data: bytes, where: str) -> npt.NDArray[Any]:
    """The reverse of `encode_unit`; bfloat16 comes back as float32. Raises IntegrityError if the bytes are damaged."""
    if not data:
        # zarr takes an empty shard for one that was never written.
        raise IntegrityError(f"{where}: {spec.name} is an empty object")
    shape = (spec.shards or spec.chunks)[:1] + spec.shape[1:]
    try:
        is_chunk = spec.shards is None
        return widened(decode_chunk(data, shape, spec.dtype) if is_chunk else decode_shard(data, shape, spec.dtype, spec.fill))
    except (ValueError, RuntimeError) as error:
        raise IntegrityError(f"{where}: {spec.name} cannot be decoded ({error})") from error


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """`zarr.json` of a group. Raises IntegrityError for attributes that are not strict JSON, which other readers refuse."""
    try:
        json.dumps(attributes, allow_nan=False)
    except (ValueError, TypeError) as error:
        raise IntegrityError(f"attributes must be plain JSON values without NaN: {error}") from error
    memory: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(memory), attributes=dict(attributes))
    return memory[METADATA_NAME].to_bytes()


def consolidated(documents: Mapping[str, bytes]) -> bytes:
    """The root's `zarr.json` with the metadata of everything in `documents` (all `zarr.json` of the store by key)."""
    as_buffer = default_buffer_prototype().buffer.from_bytes
    memory = {key: as_buffer(document) for key, document in documents.items()}
    with warnings.catch_warnings():
        # The warning says that consolidated metadata are not in the Zarr v3 specification; readers may ignore them.
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(MemoryStore(memory))
    return memory[METADATA_NAME].to_bytes()


def zarr_arguments(spec: ArraySpec) -> dict[str, Any]:
    """What zarr's `create_array` is to be called with, besides the place."""
    return {
        "shape": spec.shape,
        "chunks": spec.chunks,
        "shards": spec.shards,
        "dtype": spec.dtype,
        "fill_value": spec.fill,
        "compressors": COMPRESSORS,
        "dimension_names": spec.dims,
        "attributes": dict(spec.attributes),
    }
