"""A unit's one object to bytes and back, byte for byte as Zarr writes it, without Zarr's event loop.

Zarr moves all chunks of a process through one loop, in a thread of its own and with several copies, which takes three times as
long as the compression. Knows the codecs of a store and nothing else: blosc-lz4-bitshuffle, crc32c; of a shard, the inner chunks
along its second dim and their index behind them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc

from persona_ray.store import halves
from persona_ray.store.bfloat16 import NATIVE, widened
from persona_ray.store.halves import CLEVEL, CNAME

ABSENT = 2**64 - 1
"""Offset and size of an inner chunk that was never written."""
HEADER_BYTES = 16
"""Of a blosc buffer; bytes 4 to 7 are the size of what it holds."""
Index = npt.NDArray[np.uint64]
"""(L, 2): offset and size in bytes of each inner chunk."""
_SUM = struct.Struct("<I")


def encode_chunk(values: npt.NDArray[np.generic]) -> bytes:
    """Compressed, and its check sum."""
    chunk = _compressed(np.ascontiguousarray(values))
    return chunk + _sum_of(chunk)


def encode_shard(values_RLD: npt.NDArray[np.generic], dtype: str, *, is_rounded: bool = False) -> bytes:
    """One inner chunk for each place of the second dim, then the index: offset and size of each, and its check sum.

    `is_rounded`: `dtype` is float32, and the values are rounded to bfloat16 on the way.
    """
    parts: list[bytes | memoryview] = []
    sizes: list[int] = []
    # One for all: fresh memory for each costs more than moving the values.
    values_RD = np.empty((values_RLD.shape[0], *values_RLD.shape[2:]), dtype=NATIVE if is_rounded else np.dtype(dtype))
    for place in range(values_RLD.shape[1]):
        values_RD[...] = values_RLD[:, place]
        chunk = _compressed_widened(values_RD) if is_rounded else [_compressed(values_RD)]
        parts += chunk
        parts.append(_sum_of(*chunk))
        sizes.append(sum(map(len, chunk)) + _SUM.size)
    sizes_L = np.array(sizes, dtype="<u8")
    index = np.stack([np.cumsum(sizes_L) - sizes_L, sizes_L], axis=1).astype("<u8").tobytes()
    return b"".join([*parts, index, _sum_of(index)])


def decode_chunk(data: bytes | memoryview, shape: Sequence[int], dtype: str) -> npt.NDArray[np.generic]:
    """The reverse of `encode_chunk`. Raises ValueError or RuntimeError for damaged bytes."""
    values = np.empty(shape, dtype=dtype)
    _decode_into(values, data)
    return values


def decode_shard(data: bytes, shape: Sequence[int], dtype: str, fill: float) -> npt.NDArray[np.generic]:
    """The reverse of `encode_shard`; `fill` where no inner chunk was written. Raises ValueError or RuntimeError for damaged bytes."""
    index_L2 = decode_index(data, shape[1])
    # As the chunks lie, each where it is decoded to; handed out with its dims in order, without a copy.
    values_LRD = np.empty((shape[1], shape[0], *shape[2:]), dtype=dtype)
    for place, values_RD in enumerate(values_LRD):
        decode_inner(values_RD, inner_chunk(data, index_L2, place), fill)
    return np.moveaxis(values_LRD, 0, 1)


def index_bytes(num_chunks: int) -> int:
    """Size of the index, with which a shard ends."""
    return 16 * num_chunks + _SUM.size


def decode_index(end: bytes, num_chunks: int) -> Index:
    """The index from the bytes that a shard ends with, or from all of them. Raises ValueError for damaged ones."""
    if len(end) < index_bytes(num_chunks):
        raise ValueError("shorter than its index")
    pairs = _checked(memoryview(end)[-index_bytes(num_chunks) :])
    return np.frombuffer(pairs, dtype="<u8").reshape(-1, 2)


def span_of(index_L2: Index, place: int) -> tuple[int, int] | None:
    """Of the inner chunk at `place` the first byte in the shard, and the one behind its last; None: it was never written."""
    offset, size = index_L2[place].tolist()
    return None if offset == size == ABSENT else (offset, offset + size)


def inner_chunk(shard: bytes, index_L2: Index, place: int) -> memoryview | None:
    """What `decode_inner` takes, from the whole shard. Raises ValueError if the index points outside of it."""
    span = span_of(index_L2, place)
    if span is None:
        return None
    if span[1] > len(shard) - index_bytes(len(index_L2)):
        raise ValueError("an inner chunk lies outside of it")
    return memoryview(shard)[span[0] : span[1]]


def decode_inner(values_RD: npt.NDArray[np.generic], chunk: memoryview | None, fill: float) -> None:
    """An inner chunk into contiguous `values_RD`; None: `fill`. Raises ValueError or RuntimeError for damaged bytes."""
    if chunk is None:
        values_RD[...] = fill
    else:
        _decode_into(values_RD, chunk)


def _decode_into(values: npt.NDArray[np.generic], data: bytes | memoryview) -> None:
    payload = _checked(data)
    if len(payload) < HEADER_BYTES or int.from_bytes(payload[4:8], "little") != values.nbytes:
        raise ValueError("a chunk of another size")
    if values.dtype == np.float32 and halves.decompress_into(values.reshape(-1).view(np.uint32), payload):
        return
    Blosc().decode(payload, out=values.reshape(-1).view(np.uint8))


def _compressed(values: npt.NDArray[np.generic]) -> bytes:
    codec = Blosc(CNAME, CLEVEL, Blosc.BITSHUFFLE, typesize=values.itemsize)
    # As bytes, because bfloat16 is no type that a buffer may have.
    compressed: bytes = codec.encode(values.reshape(-1).view(np.uint8))
    return compressed


def _compressed_widened(values: npt.NDArray[np.generic]) -> list[bytes | memoryview]:
    """bfloat16 values as `_compressed` float32, in parts."""
    return halves.compress(values.reshape(-1).view(np.uint16)) or [_compressed(widened(values))]


def _sum_of(*parts: bytes | memoryview) -> bytes:
    """Of one after the other."""
    check_sum = 0
    for part in parts:
        check_sum = google_crc32c.extend(check_sum, np.frombuffer(part, dtype=np.uint8))
    return _SUM.pack(check_sum)


def _checked(data: bytes | memoryview) -> memoryview:
    """Without its check sum."""
    view = memoryview(data)
    if len(view) < _SUM.size:
        raise ValueError("too short for a check sum")
    payload = view[: -_SUM.size]
    stored, found = _SUM.unpack(view[-_SUM.size :])[0], google_crc32c.value(np.frombuffer(payload, dtype=np.uint8))
    if stored != found:
        raise ValueError(f"check sum {found:08x}, and {stored:08x} was stored")
    return payload
