"""Persona space of one store: the one place that puts role vectors, axis and principal components together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from persona_ray.config import ReduceConfig
from persona_ray.errors import NothingUsableError
from persona_ray.reduce.axis import assistant_axis, best_layer, projections, separation
from persona_ray.reduce.massive import facts, massive_dims
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.pca import PrincipalComponents, principal_components
from persona_ray.reduce.presets import rounding_of
from persona_ray.reduce.vectors import SOMEWHAT, Filter, Vectors, select_vectors, standard_error
from persona_ray.spec import Float32, Float64, Int32, Reduced, digest_of


class RowComponents(Protocol):
    """Single rollouts, as far as their components go."""

    @property
    def count(self) -> int:
        """Rows."""
        ...

    def components(self, toward_LD: Float64) -> PrincipalComponents:
        """Those of the rows, signs toward a direction."""
        ...


class Block(NamedTuple):
    """Some layers, and what is known of the rows there."""

    layers: Sequence[int]
    moments: Moments
    pca: RowComponents | None = None
    """None: components of single rollouts are not wanted."""


@dataclass(frozen=True, slots=True)
class Partly:
    """What else makes one result another one, of the same rows and settings."""

    unscored: tuple[int, ...] = ()
    """Units that the judge has not scored yet, rising: their rows make no role vector."""
    units_per_leg: int | None = None
    """By how many units states of components were taken; None: all at once. Where they are cut, a little is lost."""


WHOLE = Partly()


def persona_space(
    blocks: Iterable[Block],
    *,
    archetypes: Sequence[str],
    default_archetypes: Sequence[str],
    config: ReduceConfig,
    judge_name: str | None,
    ledger_digest: str,
    partly: Partly = WHOLE,
) -> Reduced:
    """Role vectors, axis and principal components of `blocks`, computed in float64 and handed over as float32.

    `blocks` are of captured decoder blocks, all of the same rows; one is held at a time. `archetypes` are
    names by code, `judge_name` None if no judge has scored the rows (then every row counts). The name is made of ledger, judge and
    settings: equal name, equal content. Attributes are plain JSON; `best_layer` is a decoder block, lists per layer follow the
    layers, an unknown separation is null.
    Raises NothingUsableError without rows of the default Assistant or with fewer than two role vectors.
    """
    keep = Filter(config.min_score if judge_name is not None else None, config.min_count)
    default_codes = {code for code, name in enumerate(archetypes) if name in default_archetypes}
    parts: list[_Part] = []
    for block in blocks:
        vectors = select_vectors(block.moments, num_archetypes=len(archetypes), default_codes=default_codes, keep=keep)
        _require_enough(vectors, block.moments, archetypes, default_archetypes, keep)
        parts.append(_Part.of(vectors, block, config))
    layers = tuple(layer for part in parts for layer in part.layers)
    return Reduced(
        name=space_name(ledger_digest, judge_name, layers, config, partly),
        archetypes=tuple(archetypes),
        layers=layers,
        role_count_A=parts[0].count_A,
        **_joined(parts),
        attributes={
            "ledger_digest": ledger_digest,
            "preset": config.preset,
            "judge": judge_name,
            "min_score": keep.min_score,
            "min_count": keep.min_count,
            "filter": _in_words(keep, judge_name, "somewhat_vector_ALD" in parts[0].arrays),
            "pca": config.pca,
            "num_rows": parts[0].num_rows,
            "units_without_scores": len(partly.unscored),
            "rollout_pca": _rollout_pca_in_words(parts[0], layers, config),
            "default_archetypes": list(default_archetypes),
            **_along_the_axis(parts, archetypes, layers),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """The persona space of one block of layers."""

    layers: tuple[int, ...]
    num_rows: int
    count_A: Int32
    arrays: Mapping[str, Float32]
    """Fields of `Reduced` that have a layer dim."""
    axis_norm_L: Float64
    separation_L: Float64
    position_L_of: Mapping[int, Float64]
    """Archetype code -> projection on the axis."""
    error_L_of: Mapping[int, Float64]
    """Archetype code -> standard error of its vector."""
    massive: Mapping[str, list[Any]]

    @classmethod
    def of(cls, vectors: Vectors, block: Block, config: ReduceConfig) -> _Part:
        """Everything of the block that is kept; float32 where it goes to the store."""
        rounding, num_archetypes = rounding_of(config.preset), len(vectors.count_A)
        default_LD, role_ALD = rounding(vectors.default_vector), rounding(vectors.role_vectors)
        axis_LD = assistant_axis(default_LD, role_ALD, rounding)
        somewhat_ALD = rounding(vectors.somewhat_vectors) if config.somewhat and vectors.somewhat else None
        among_ALD = role_ALD if somewhat_ALD is None else np.concatenate([role_ALD, somewhat_ALD])
        found = principal_components(among_ALD, axis_LD, config.rank, config.pca)
        arrays = {
            "role_vector_ALD": _by_code(role_ALD, list(vectors.roles), num_archetypes),
            "default_vector_LD": default_LD,
            "axis_LD": axis_LD,
            "pca_components_LKD": found.components_LKD,
            "pca_explained_variance_LK": found.explained_variance_LK,
            "pca_explained_variance_ratio_LK": found.explained_variance_ratio_LK,
            "pca_mean_LD": found.mean_LD,
            "pca_scale_LD": found.scale_LD,
            "cos_pc1_axis_L": projections(found.components_LKD[None, :, 0], axis_LD * found.scale_LD)[0],
        }
        if block.pca is not None and block.pca.count > 1:
            arrays |= _of_rollouts(block.pca.components(axis_LD), axis_LD)
        if somewhat_ALD is not None:
            arrays["somewhat_vector_ALD"] = _by_code(somewhat_ALD, list(vectors.somewhat), num_archetypes)
        everyone = {**vectors.defaults, **vectors.roles}
        position_AL = projections(np.stack([moments.mean_LD for moments in everyone.values()]), axis_LD)
        return cls(
            layers=tuple(block.layers),
            num_rows=block.moments.num_rows,
            count_A=vectors.count_A,
            arrays={name: values.astype(np.float32) for name, values in arrays.items()},
            axis_norm_L=np.linalg.norm(axis_LD, axis=-1),
            separation_L=separation(axis_LD, everyone.values()),
            position_L_of=dict(zip(everyone, position_AL, strict=True)),
            error_L_of={code: standard_error(moments) for code, moments in everyone.items()},
            massive=facts(axis_LD, massive_dims(np.concatenate([role_ALD, default_LD[None]]))),
        )


def _of_rollouts(found: PrincipalComponents, axis_LD: Float64) -> dict[str, Float64]:
    return {
        "rollout_pca_components_LKD": found.components_LKD,
        "rollout_pca_explained_variance_LK": found.explained_variance_LK,
        "rollout_pca_explained_variance_ratio_LK": found.explained_variance_ratio_LK,
        "rollout_pca_mean_LD": found.mean_LD,
        "cos_rollout_pc1_axis_L": projections(found.components_LKD[None, :, 0], axis_LD)[0],
    }


def _rollout_pca_in_words(part: _Part, layers: Sequence[int], config: ReduceConfig) -> str | None:
    if "rollout_pca_mean_LD" not in part.arrays:
        return None
    exact = [layer for layer in layers if layer in config.exact_layers]
    at = f"; exact at layers {exact}" if exact else ""
    return f"all {part.num_rows} stored rows, centred, incremental of rank {config.rank}{at}"


def _joined(parts: Sequence[_Part]) -> dict[str, Float32]:
    """Arrays of all layers; those of an archetype have it as first dim, the others the layer."""
    return {name: np.concatenate([part.arrays[name] for part in parts], axis=1 if name.endswith("_ALD") else 0) for name in parts[0].arrays}


def _require_enough(vectors: Vectors, moments: Moments, archetypes: Sequence[str], default_archetypes: Sequence[str], keep: Filter) -> None:
    if not vectors.defaults:
        names = ", ".join(default_archetypes) or "no archetype is flagged as it"
        raise NothingUsableError(f"no row of the default Assistant ({names}) is stored, and without it there is no axis")
    if len(vectors.roles) < 2:
        roles_A = [code for code, name in enumerate(archetypes) if name not in default_archetypes]
        most = int(vectors.count_A[roles_A].max(initial=0))
        scored, or_score = ("", "") if keep.min_score is None else (f" of score >= {keep.min_score}", " or reduce.min_score")
        raise NothingUsableError(
            f"{len(vectors.roles)} of {len(roles_A)} archetypes have a role vector, at least 2 are needed: "
            f"it takes reduce.min_count = {keep.min_count} rows{scored}, and the best archetype has {most}"
            f"{_rows_left_out(moments, frozenset(roles_A), keep)}. Add rollouts, or lower reduce.min_count{or_score}."
        )


def _rows_left_out(moments: Moments, roles: frozenset[int], keep: Filter) -> str:
    """How many rows the score filter has dropped, by score."""
    dropped: Counter[int] = Counter()
    for group, found in moments.groups.items():
        if group.archetype in roles and not keep.passes(group.score):
            dropped[group.score] += found.count
    by_score = ", ".join(f"{dropped[score]} {'without a score' if score < 0 else f'of score {score}'}" for score in sorted(dropped))
    return f" (left out: {by_score})" if dropped else ""


def space_name(ledger_digest: str, judge_name: str | None, layers: Sequence[int], config: ReduceConfig, partly: Partly = WHOLE) -> str:
    """Name of the persona space of these layers of this data under these settings: 16 hex digits."""
    settings = config.model_dump(
        mode="json", exclude={"stop", "extra", "checkpoint_rows", "device"}
    )  # say when rows end and are kept, and what computes, not what is made of them
    legs = {} if config.rollout_pca == "none" else {"units_per_leg": partly.units_per_leg}
    without = {"unscored": list(partly.unscored)} if partly.unscored else {}
    data = {"ledger": ledger_digest, "scores": judge_name, "layers": list(layers)}
    return digest_of({**data, "settings": settings, **legs, **without})[:16]


def _by_code(kept_ALD: Float64, codes: Sequence[int], num_archetypes: int) -> Float64:
    by_code_ALD = np.full((num_archetypes, *kept_ALD.shape[1:]), np.nan)
    by_code_ALD[codes] = kept_ALD
    return by_code_ALD


def _in_words(keep: Filter, judge_name: str | None, has_somewhat: bool) -> str:
    counted = "no judge: every row counts" if keep.min_score is None else f"rows of score >= {keep.min_score} by {judge_name}"
    somewhat = f"; components also over vectors of score {SOMEWHAT}" if has_somewhat else ""
    return f"{counted}; at least {keep.min_count} of them for a role vector; all rows of the default Assistant{somewhat}"


def _along_the_axis(parts: Sequence[_Part], archetypes: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
    separation_L = np.concatenate([part.separation_L for part in parts])
    layer, reason = best_layer(separation_L, layers)
    positions = {code: np.concatenate([part.position_L_of[code] for part in parts]) for code in parts[0].position_L_of}
    return {
        "best_layer": layer,
        "best_layer_reason": reason,
        "separation": _as_json(separation_L),
        "axis_norm": _as_json(np.concatenate([part.axis_norm_L for part in parts])),
        "projections": {archetypes[code]: _as_json(position_L) for code, position_L in positions.items()},
        "vector_error": {archetypes[code]: _as_json(np.concatenate([part.error_L_of[code] for part in parts])) for code in positions},
        **{key: [value for part in parts for value in part.massive[key]] for key in parts[0].massive},
    }


def _as_json(values_L: Float64) -> list[float | None]:
    """Six significant digits are plenty for reading, and keep the attributes of 276 archetypes x 80 layers small."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values_L]
