"""Blosc chunks of float32 values that bfloat16 holds, by way of their upper halves: half the bytes to shuffle and to compress.

Shuffled by bits and split, a block of such values is four streams, one for each byte of a value: two of nothing but zeros, and the
two that the same values have as bfloat16. So Blosc compresses the bfloat16 values, and its streams are put behind those of zeros; on
the way back they are taken out again. The bytes are those that Blosc makes of the float32 values; only where its blocks would not
divide the chunk evenly, the blocks are smaller. Every Blosc reads them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numcodecs.blosc import Blosc

CNAME, CLEVEL = "lz4", 5
HEADER = struct.Struct("<4B3I")
"""Version, version of the codec, flags, bytes of a value; bytes of all values, of a block of values, of the buffer."""
FLAGS = 0b00100100
"""lz4, shuffled by bits, split into streams; a buffer that is not compressed has others."""
MAX_BLOCK_VALUES = 1 << 17
"""What Blosc takes for this codec and level."""
MIN_BLOCK_VALUES = 1 << 10
"""Blocks of fewer are not worth their overhead."""
SHUFFLED_AT_ONCE = 8
"""Values; the rest of a block would lie unshuffled behind the streams."""
_INT = struct.Struct("<i")
_BY_HALVES = Blosc(CNAME, CLEVEL, Blosc.BITSHUFFLE, typesize=2)
_WHOLE = Blosc(CNAME, CLEVEL, Blosc.BITSHUFFLE, typesize=4)


def compress(upper_N: npt.NDArray[np.uint16]) -> list[bytes | memoryview] | None:
    """Parts of the buffer that holds the float32 values with these upper halves; None if it has to be made from the whole values."""
    block_values = _block_values(len(upper_N))
    if block_values is None:
        return None
    blocks = [_BY_HALVES.encode(upper_N[first : first + block_values]) for first in range(0, len(upper_N), block_values)]
    heads = [HEADER.unpack_from(block) for block in blocks]
    if any((head[2], head[5]) != (FLAGS, 2 * block_values) for head in heads):
        return None
    zeros = _zeros(block_values)
    starts, end = [], HEADER.size + _INT.size * len(blocks)
    for block in blocks:
        starts.append(_INT.pack(end))
        end += len(zeros) + len(block) - HEADER.size - _INT.size
    version, codec_version = heads[0][:2]
    head = HEADER.pack(version, codec_version, FLAGS, 4, 4 * len(upper_N), 4 * block_values, end)
    parts: list[bytes | memoryview] = [b"".join([head, *starts])]
    for block in blocks:
        parts += zeros, memoryview(block)[HEADER.size + _INT.size :]
    return parts


def decompress_into(bits_N: npt.NDArray[np.uint32], buffer: memoryview) -> bool:
    """The bits of the float32 values, if `buffer` is such a one; False if it has to be read as whole values.

    Raises RuntimeError for damaged bytes.
    """
    blocks = _blocks(buffer, len(bits_N))
    if blocks is None:
        return False
    block_values = len(bits_N) // len(blocks)
    upper_B = np.empty(block_values, dtype=np.uint16)
    for place, block in enumerate(blocks):
        start = HEADER.size + _INT.size
        head = HEADER.pack(*buffer[:3], 2, 2 * block_values, 2 * block_values, start + len(block))
        _BY_HALVES.decode(b"".join([head, _INT.pack(start), block]), out=upper_B)
        bits_B = bits_N[place * block_values : (place + 1) * block_values]
        bits_B[...] = upper_B
        bits_B <<= 16
    return True


def _block_values(num_values: int) -> int | None:
    """The most values of a block that divides `num_values` evenly and is shuffled whole; None if that is too few."""
    for num_blocks in range(max(1, -(-num_values // MAX_BLOCK_VALUES)), max(1, num_values // MIN_BLOCK_VALUES) + 1):
        block_values, rest = divmod(num_values, num_blocks)
        if rest == 0 and block_values % SHUFFLED_AT_ONCE == 0 and block_values >= MIN_BLOCK_VALUES:
            return block_values
    return None


def _blocks(buffer: memoryview, num_values: int) -> Sequence[memoryview] | None:
    """The streams of the upper halves, block by block; None unless all other streams are zeros and all blocks of one size."""
    if len(buffer) < HEADER.size:
        return None
    _, _, flags, value_bytes, num_bytes, block_bytes, _ = HEADER.unpack_from(buffer)
    block_values, rest = divmod(block_bytes, 4)
    is_plain = (flags, value_bytes, num_bytes, rest) == (FLAGS, 4, 4 * num_values, 0)
    if not is_plain or block_values < MIN_BLOCK_VALUES or num_values % block_values or block_values % SHUFFLED_AT_ONCE:
        return None
    starts = np.frombuffer(buffer, dtype="<i4", count=num_values // block_values, offset=HEADER.size).tolist()
    zeros = _zeros(block_values)
    found = [buffer[start:end] for start, end in zip(starts, [*starts[1:], len(buffer)], strict=True)]
    return [block[len(zeros) :] for block in found] if all(bytes(block[: len(zeros)]) == zeros for block in found) else None


@lru_cache
def _zeros(block_values: int) -> bytes:
    """The streams of a block's lower halves, as Blosc makes them."""
    buffer = _WHOLE.encode(np.zeros(block_values, dtype=np.uint32))
    start = HEADER.size + _INT.size
    return 2 * bytes(buffer[start : start + _INT.size + _INT.unpack_from(buffer, start)[0]])
