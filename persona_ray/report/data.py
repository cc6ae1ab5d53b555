"""What a report shows, and the geometry between the reduced arrays and a picture.

Pure numpy; knows nothing of HTML, terminals or stores. All positions are taken from the mean of the role vectors, which is
the origin of the map: seen from there the default Assistant lies at exactly the axis, because axis = default - mean of roles
(Lu et al., arXiv 2601.10387, section 3). A position along the axis is given in lengths of the axis: 0 is the mean role, 1 the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from persona_ray.errors import IntegrityError
from persona_ray.reduce.space_pair import SpacePair
from persona_ray.spec import Certainty, Float64, Reduced, SteeringCheck

MAP_DIMS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything the page is made from.

    `run` says what was run. All keys are optional, and keys that are not listed here are shown as they are: `title`, `model_id`,
    `identity_digest`, `ledger_digest`, `store_url`, `rows` ({asked, stored, refused, reasons: {reason: rows}}), `units`, `judge`, `preset`,
    `seconds` ({phase: seconds}), `hardware`, `versions` ({package: version}), `date`.
    """

    reduced: Reduced
    steering: SteeringCheck | None
    run: Mapping[str, Any]
    certainty: Certainty | None = None
    comparisons: tuple[SpacePair, ...] = ()
    """With other persona spaces; this one is `a` in all of them."""


@dataclass(frozen=True, slots=True)
class DimView:
    """What single dims of the residual stream have to do with the axis at one layer."""

    massive: Mapping[str, float]
    """Massive dim -> its size over that of the median dim, the largest first."""
    share_of_massive: float
    """Of the axis's squared length, 0..1."""
    participation: float
    """How many dims carry the axis: participation ratio, 1 to hidden size."""


@dataclass(frozen=True, slots=True)
class RolloutView:
    """PC1 of single rollouts at one layer."""

    cos_pc1_axis: float
    pc1_ratio: float
    """Share of the variance between rollouts, 0..1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerView:
    """One layer, ready to be drawn. The first dim of the role arrays follows `role_indices`."""

    layer: int
    roles_A3: Float64
    """Coordinates on PC1..PC3 from the mean role, in units of the activations."""
    default_3: Float64
    """Same for the default Assistant; also the axis as it lies in this space."""
    position_A: Float64
    """Place along the axis: 0 = mean role, 1 = default Assistant."""
    axis_norm: float
    cos_pc1_axis: float
    explained_ratio_K: Float64
    separation: float | None
    """As the reduction recorded it."""
    rollouts: RolloutView | None = None
    """None: not computed."""
    dims: DimView | None = None
    """None: in results older than it."""

    @property
    def pc1_ratio(self) -> float:
        """Share of the variance between role vectors that PC1 explains, 0..1."""
        return float(self.explained_ratio_K[0])

    @property
    def share_in_plane(self) -> float:
        """How much of the axis's length lies in the PC1 x PC2 plane, 0..1."""
        return _ratio(float(np.linalg.norm(self.default_3[:2])), self.axis_norm)


@dataclass(frozen=True, slots=True)
class Ranked:
    """One line of the ranking."""

    name: str
    position: float
    num_rows: int
    is_default: bool


def role_indices(reduced: Reduced) -> npt.NDArray[np.intp]:
    """Archetype codes that have a role vector, ascending. Raises IntegrityError if there is none."""
    indices = np.flatnonzero(np.isfinite(reduced.role_vector_ALD).all(axis=(1, 2)))
    if not len(indices):
        raise IntegrityError(
            f"reduced/{reduced.name}: no archetype has a role vector, nothing can be drawn; lower reduce.min_count or add rows"
        )
    return indices


def default_names(reduced: Reduced) -> tuple[str, ...]:
    """Archetypes that are the default Assistant."""
    return tuple(reduced.attributes.get("default_archetypes", ()))


def missing_names(reduced: Reduced) -> tuple[str, ...]:
    """Archetypes, the default aside, that have too few rows for a role vector."""
    present = set(role_indices(reduced).tolist()) | {reduced.archetypes.index(name) for name in default_names(reduced)}
    return tuple(name for code, name in enumerate(reduced.archetypes) if code not in present)


def best_place(reduced: Reduced) -> int:
    """Place of the best layer among `reduced.layers`. Raises IntegrityError if none is recorded."""
    layer = reduced.attributes.get("best_layer")
    if layer not in reduced.layers:
        raise IntegrityError(
            f"reduced/{reduced.name}: best_layer is {layer!r}, expected one of {list(reduced.layers)}; reduce the store again"
        )
    return reduced.layers.index(layer)


def layer_view(reduced: Reduced, place: int) -> LayerView:
    """Geometry of the layer at `place` of `reduced.layers`."""
    roles_AD = reduced.role_vector_ALD[role_indices(reduced), place].astype(np.float64)
    from_mean_AD = roles_AD - roles_AD.mean(axis=0)
    axis_D = reduced.axis_LD[place].astype(np.float64)
    components_KD = reduced.pca_components_LKD[place, :MAP_DIMS].astype(np.float64)
    if reduced.pca_scale_LD is not None:
        components_KD *= reduced.pca_scale_LD[place]
    norm = float(np.linalg.norm(axis_D))
    separation = reduced.attributes.get("separation")
    return LayerView(
        layer=reduced.layers[place],
        roles_A3=_padded(from_mean_AD @ components_KD.T),
        default_3=_padded(axis_D @ components_KD.T),
        position_A=from_mean_AD @ axis_D / norm**2 if norm else np.zeros(len(roles_AD)),
        axis_norm=norm,
        cos_pc1_axis=float(reduced.cos_pc1_axis_L[place]),
        explained_ratio_K=reduced.pca_explained_variance_ratio_LK[place].astype(np.float64),
        separation=None if separation is None or separation[place] is None else float(separation[place]),
        rollouts=None if reduced.cos_rollout_pc1_axis_L is None else _of_rollouts(reduced, place),
        dims=_of_dims(reduced.attributes, place) if "massive_dims" in reduced.attributes else None,
    )


def _of_dims(attributes: Mapping[str, Any], place: int) -> DimView:
    return DimView(
        massive=attributes["massive_dims"][place],
        share_of_massive=attributes["axis_share_of_massive_dims"][place],
        participation=attributes["axis_participation"][place],
    )


def _of_rollouts(reduced: Reduced, place: int) -> RolloutView:
    assert reduced.cos_rollout_pc1_axis_L is not None
    assert reduced.rollout_pca_explained_variance_ratio_LK is not None
    ratio_K = reduced.rollout_pca_explained_variance_ratio_LK[place]
    return RolloutView(float(reduced.cos_rollout_pc1_axis_L[place]), float(ratio_K[0]))


def layer_views(reduced: Reduced) -> tuple[LayerView, ...]:
    """All layers, in order. The arbitrary signs of PC2 and PC3 are chosen so that pictures of neighbouring layers look alike."""
    views: list[LayerView] = []
    for place in range(len(reduced.layers)):
        view = layer_view(reduced, place)
        views.append(_turned_like(views[-1], view) if views else view)
    return tuple(views)


def ranking(reduced: Reduced, view: LayerView) -> tuple[Ranked, ...]:
    """All archetypes with a role vector and the default Assistant, the most Assistant-like first."""
    roles = [
        Ranked(reduced.archetypes[code], float(position), int(reduced.role_count_A[code]), is_default=False)
        for code, position in zip(role_indices(reduced), view.position_A, strict=True)
    ]
    defaults = default_names(reduced)
    num_rows = sum(int(reduced.role_count_A[reduced.archetypes.index(name)]) for name in defaults)
    default = Ranked(", ".join(defaults) or "default", 1.0, num_rows, is_default=True)
    return tuple(sorted([*roles, default], key=lambda ranked: (-ranked.position, not ranked.is_default, ranked.name)))


def _padded(coordinates: Float64) -> Float64:
    """Zeros for the components which a small set of archetypes does not have."""
    missing = MAP_DIMS - coordinates.shape[-1]
    return np.pad(coordinates, [(0, 0)] * (coordinates.ndim - 1) + [(0, missing)])


def _turned_like(before: LayerView, view: LayerView) -> LayerView:
    agreement_3 = np.sum(before.roles_A3 * view.roles_A3, axis=0)
    signs_3 = np.where(agreement_3 < 0, -1.0, 1.0)
    # PC1's sign has a meaning: it points to the default Assistant.
    signs_3[0] = 1.0
    return replace(view, roles_A3=view.roles_A3 * signs_3, default_3=view.default_3 * signs_3)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
