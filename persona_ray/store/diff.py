"""Are two stores equal as sets of rows? By row key, whatever their units and order: texts, token ids, status, and every number.

Texts are compared by digests, so each is read once; for the numbers see `diff_numbers`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from persona_ray.spec import ProgressCallback, Rollout, RowKey
from persona_ray.store.diff_numbers import LayerDifference, layer_differences
from persona_ray.store.diff_side import Side
from persona_ray.store.identity import FieldDifference, differing_fields
from persona_ray.store.reader import StoreReader


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDifference:
    """What two stores do not share. Rows are those of committed units, refused ones included."""

    a: str
    b: str
    tolerance: float | None
    identity: tuple[FieldDifference, ...]
    """For information: units of another size do not make other rows."""
    both: int
    """Rows that both have."""
    only_in_a: tuple[RowKey, ...]
    only_in_b: tuple[RowKey, ...]
    status: tuple[RowKey, ...]
    """Refused in one alone."""
    texts: tuple[RowKey, ...]
    """Prompt, question, answer, reasoning or the reason of its end differ."""
    token_ids: tuple[RowKey, ...]
    """Token ids or the pooled range differ."""
    layers: tuple[LayerDifference, ...]
    """Of the layers that both have, rising."""
    layers_only_in_a: tuple[int, ...]
    layers_only_in_b: tuple[int, ...]

    @property
    def is_equal(self) -> bool:
        """Whether both are the same set of rows, numbers within the tolerance."""
        lists = (self.only_in_a, self.only_in_b, self.status, self.texts, self.token_ids, self.layers_only_in_a, self.layers_only_in_b)
        return not any(lists) and not any(layer.outside or layer.only_in_a or layer.only_in_b for layer in self.layers)


def diff_stores(
    a: StoreReader, b: StoreReader, *, tolerance: float | None = None, progress: ProgressCallback = lambda _: None
) -> StoreDifference:
    """Compare all committed rows of `a` and `b`. `tolerance`: largest relative difference that counts as equal; None: bit-equal.

    Takes at most about 1 GB for numbers, and 32 bytes for each row's text. `progress` counts units read of A, once for text and
    once for each pass over the numbers. Raises IntegrityError for an object that is missing or damaged.
    """
    one, other = Side.of(a), Side.of(b)
    both = [key for key in one.rows if key in other.rows]
    texts, token_ids = _text_differences(one, other, both, progress)
    shared = sorted(set(one.layers) & set(other.layers)) if a.hidden_size == b.hidden_size else []
    return StoreDifference(
        a=a.url,
        b=b.url,
        tolerance=tolerance,
        identity=tuple(differing_fields(a.identity, b.identity)),
        both=len(both),
        only_in_a=tuple(key for key in one.rows if key not in other.rows),
        only_in_b=tuple(key for key in other.rows if key not in one.rows),
        status=tuple(key for key in both if one.is_refused(key) != other.is_refused(key)),
        texts=texts,
        token_ids=token_ids,
        layers=tuple(layer_differences(one, other, both, shared, tolerance, progress)),
        layers_only_in_a=tuple(layer for layer in one.layers if layer not in shared),
        layers_only_in_b=tuple(layer for layer in other.layers if layer not in shared),
    )


def _text_differences(
    a: Side, b: Side, both: Sequence[RowKey], progress: ProgressCallback
) -> tuple[tuple[RowKey, ...], tuple[RowKey, ...]]:
    """Rows whose texts differ, and rows whose token ids or spans do."""
    of_a, of_b = _digests_by_row(a, progress), _digests_by_row(b, lambda _: None)
    pairs = [(key, of_a[a.rows[key]], of_b[b.rows[key]]) for key in both]
    texts, token_ids = ([key for key, one, other in pairs if one[place] != other[place]] for place in range(2))
    return tuple(texts), tuple(token_ids)


def _digests_by_row(side: Side, progress: ProgressCallback) -> Mapping[int, tuple[bytes, bytes]]:
    """Row -> digests of its text and of its token ids."""
    found: dict[int, tuple[bytes, bytes]] = {}
    for rollouts in side.store.rollouts(side.units):
        found |= {rollout.index: _digests(rollout) for rollout in rollouts}
        progress(1)
    return found


def _digests(rollout: Rollout) -> tuple[bytes, bytes]:
    said = (rollout.system_prompt, rollout.question, rollout.response, rollout.thinking, rollout.finish_reason.name)
    texts = "\x1e".join(f"{len(text)}\x1f{text}" for text in said)
    spans = np.array([rollout.response_start, rollout.response_end], dtype=np.int64).tobytes()
    token_ids = np.asarray(rollout.token_ids, dtype=np.int32).tobytes()
    return _digest(texts.encode("utf-8", "surrogatepass")), _digest(spans + token_ids)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
