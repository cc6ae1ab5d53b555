"""Persona space of one store: the one place that puts role vectors, axis and principal components together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from persona_ray.config import ReduceConfig
from persona_ray.errors import NothingUsableError
from persona_ray.reduce.axis import assistant_axis, best_layer, projections, separation
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.pca import principal_components
from persona_ray.reduce.vectors import Filter, Vectors, select_vectors
from persona_ray.spec import Float32, Float64, Reduced, digest_of


def persona_space(
    moments: Moments,
    *,
    archetypes: Sequence[str],
    default_archetypes: Sequence[str],
    layers: Sequence[int],
    config: ReduceConfig,
    judge_name: str | None,
    ledger_digest: str,
) -> Reduced:
    """Role vectors, axis and principal components of `moments`, computed in float64 and handed over as float32.

    `archetypes` are names by code, `layers` the captured decoder blocks, `judge_name` None if no judge has scored the rows
    (then every row counts). The name is made of ledger, judge and settings: equal name, equal content. Attributes are
    plain JSON; `best_layer` is a decoder block, lists per layer follow `layers`, an unknown separation is null.
    Raises NothingUsableError without rows of the default Assistant or with fewer than two role vectors.
    """
    keep = Filter(config.min_score if judge_name is not None else None, config.min_count)
    default_codes = {code for code, name in enumerate(archetypes) if name in default_archetypes}
    vectors = select_vectors(moments, num_archetypes=len(archetypes), default_codes=default_codes, keep=keep)
    _require_enough(vectors, archetypes, default_archetypes, keep)

    default_vector_LD, role_vector_ALD = vectors.default_vector, vectors.role_vectors
    axis_LD = assistant_axis(default_vector_LD, role_vector_ALD)
    found = principal_components(role_vector_ALD, axis_LD, config.rank)
    return Reduced(
        name=space_name(ledger_digest, judge_name, layers, config),
        archetypes=tuple(archetypes),
        layers=tuple(layers),
        role_vector_ALD=_by_code(role_vector_ALD, list(vectors.roles), len(archetypes)),
        role_count_A=vectors.count_A,
        default_vector_LD=default_vector_LD.astype(np.float32),
        axis_LD=axis_LD.astype(np.float32),
        pca_components_LKD=found.components_LKD.astype(np.float32),
        pca_explained_variance_LK=found.explained_variance_LK.astype(np.float32),
        pca_explained_variance_ratio_LK=found.explained_variance_ratio_LK.astype(np.float32),
        cos_pc1_axis_L=projections(found.components_LKD[None, :, 0], axis_LD)[0].astype(np.float32),
        attributes={
            "ledger_digest": ledger_digest,
            "preset": config.preset,
            "judge": judge_name,
            "min_score": keep.min_score,
            "min_count": keep.min_count,
            "filter": _in_words(keep, judge_name),
            "num_rows": moments.num_rows,
            "default_archetypes": list(default_archetypes),
            **_along_the_axis(vectors, axis_LD, archetypes, layers),
        },
    )


def _require_enough(vectors: Vectors, archetypes: Sequence[str], default_archetypes: Sequence[str], keep: Filter) -> None:
    if not vectors.defaults:
        names = ", ".join(default_archetypes) or "no archetype is flagged as it"
        raise NothingUsableError(f"no row of the default Assistant ({names}) is stored, and without it there is no axis")
    if len(vectors.roles) < 2:
        roles_A = [code for code, name in enumerate(archetypes) if name not in default_archetypes]
        most = int(vectors.count_A[roles_A].max(initial=0))
        scored, or_score = ("", "") if keep.min_score is None else (f" of score >= {keep.min_score}", " or reduce.min_score")
        raise NothingUsableError(
            f"{len(vectors.roles)} of {len(roles_A)} archetypes have a role vector, at least 2 are needed: "
            f"it takes reduce.min_count = {keep.min_count} rows{scored}, and the best archetype has {most}. "
            f"Add rollouts, or lower reduce.min_count{or_score}."
        )


def space_name(ledger_digest: str, judge_name: str | None, layers: Sequence[int], config: ReduceConfig) -> str:
    """Name of the persona space of these layers of this data under these settings: 16 hex digits."""
    settings = config.model_dump(mode="json", exclude={"stop"})  # says when rows end, not what is made of them
    return digest_of({"ledger": ledger_digest, "scores": judge_name, "layers": list(layers), "settings": settings})[:16]


def _by_code(kept_ALD: Float64, codes: Sequence[int], num_archetypes: int) -> Float32:
    role_vector_ALD = np.full((num_archetypes, *kept_ALD.shape[1:]), np.nan, np.float32)
    role_vector_ALD[codes] = kept_ALD
    return role_vector_ALD


def _in_words(keep: Filter, judge_name: str | None) -> str:
    counted = "no judge: every row counts" if keep.min_score is None else f"rows of score >= {keep.min_score} by {judge_name}"
    return f"{counted}; at least {keep.min_count} of them for a role vector; all rows of the default Assistant"


def _along_the_axis(vectors: Vectors, axis_LD: Float64, archetypes: Sequence[str], layers: Sequence[int]) -> dict[str, Any]:
    everyone = {**vectors.defaults, **vectors.roles}
    separation_L = separation(axis_LD, everyone.values())
    layer, reason = best_layer(separation_L, layers)
    position_AL = projections(np.stack([moments.mean_LD for moments in everyone.values()]), axis_LD)
    return {
        "best_layer": layer,
        "best_layer_reason": reason,
        "separation": _as_json(separation_L),
        "axis_norm": _as_json(np.linalg.norm(axis_LD, axis=-1)),
        "projections": {archetypes[code]: _as_json(position_L) for code, position_L in zip(everyone, position_AL, strict=True)},
    }


def _as_json(values_L: Float64) -> list[float | None]:
    """Six significant digits are plenty for reading, and keep the attributes of 276 archetypes x 80 layers small."""
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values_L]
