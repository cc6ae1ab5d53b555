"""Two persona spaces against each other: which quantities can be had of the pair, and in words why the others cannot.

Values in, values out; where the spaces are stored is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_ray.errors import InputError
from persona_ray.reduce.compare import coordinates, cosines, pearson, positions, principal_angles, same_depth, spearman
from persona_ray.spec import Float64, Reduced

MIN_SHARED = 3
"""Archetypes with a role vector in both, without which no correlation says anything."""
NO_VARIANCE = 1e-12
"""A share of the variance that is rounding alone."""
SETTINGS = ("judge", "preset", "min_score", "min_count", "pca")
"""Attributes of a result that decide which rows count and what is made of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is compared of one persona space. A = archetypes that have a role vector; role vectors themselves are not kept."""

    label: str
    """How people call it."""
    model_id: str
    num_blocks: int
    """Decoder blocks of the model; up to the last captured one, where the model's number is not known."""
    is_depth_known: bool
    layers: tuple[int, ...]
    best_place: int
    """Place of the recommended layer among `layers`."""
    archetypes: tuple[str, ...]
    position_AL: Float64
    """Along the axis: 0 is the mean role, 1 the default Assistant."""
    loading_ALK: Float64
    """On the first K principal components."""
    axis_LD: Float64
    components_LKD: Float64
    """The first K."""
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, reduced: Reduced, *, label: str, model_id: str, num_blocks: int, is_depth_known: bool, num_components: int) -> Space:
        """Of a result, layer by layer. Raises InputError if it has no recommended layer."""
        best = reduced.attributes.get("best_layer")
        if best not in reduced.layers:
            raise InputError(f"{label}: the result {reduced.name} recommends no layer; reduce the store again")
        num_components = _with_variance(reduced, num_components)
        codes: list[int] = np.flatnonzero(np.isfinite(reduced.role_vector_ALD).all(axis=(1, 2))).tolist()
        found = [_at_layer(reduced, codes, place, num_components) for place in range(len(reduced.layers))]
        return cls(
            label=label,
            model_id=model_id,
            num_blocks=num_blocks,
            is_depth_known=is_depth_known,
            layers=reduced.layers,
            best_place=reduced.layers.index(best),
            archetypes=tuple(reduced.archetypes[code] for code in codes),
            position_AL=np.stack([position_A for position_A, _ in found], axis=1),
            loading_ALK=np.stack([loading_AK for _, loading_AK in found], axis=1),
            axis_LD=reduced.axis_LD.astype(np.float64),
            components_LKD=reduced.pca_components_LKD[:, :num_components].astype(np.float64),
            settings={name: reduced.attributes.get(name) for name in SETTINGS},
        )

    @property
    def best_layer(self) -> int:
        """The recommended one."""
        return self.layers[self.best_place]

    @property
    def hidden_size(self) -> int:
        """Model width."""
        return int(self.axis_LD.shape[-1])

    @property
    def num_components(self) -> int:
        """K; fewer than asked for, where the result has no more."""
        return int(self.components_LKD.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPair:
    """One layer of either space. None: cannot be had, see `SpacePair.notes`."""

    layer_a: int
    layer_b: int
    axis_cosine: float | None
    component_cosines: tuple[float, ...] | None
    """Of PC1 with PC1, PC2 with PC2 ...; from PC2 on without sign, which is a convention there."""
    principal_angles: tuple[float, ...] | None
    """Between the subspaces of the first components, degrees, the smallest first."""
    position_pearson: float | None
    """Of the shared archetypes' places along either axis."""
    position_spearman: float | None
    loading_pearson: tuple[float, ...] | None
    """Of their loadings on PC1, PC2 ...; from PC2 on without sign."""
    loading_spearman: tuple[float, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacePair:
    """What can be said of two persona spaces."""

    a: Space
    b: Space
    shared: tuple[str, ...]
    """Archetypes with a role vector in both."""
    left_out: tuple[str, ...]
    """Those with a role vector in one of them only."""
    at_best: LayerPair
    """Each at its own recommended layer. Directions of two different layers are not compared."""
    at_best_of_a: LayerPair | None
    """Both at that of `a`; None where `b` lacks it or its residual stream is another."""
    layers: tuple[LayerPair, ...]
    """The layers that both have; of models of different width, each of `a` with the one of `b` that is nearest in relative depth."""
    notes: tuple[str, ...]
    """What could not be had, and what must be known before the numbers are believed."""


def compare_spaces(a: Space, b: Space) -> SpacePair:
    """Everything that can be had of the pair. Raises InputError if nothing can."""
    names = set(a.archetypes) & set(b.archetypes)
    shared = tuple(name for name in a.archetypes if name in names)
    common = _common_layers(a, b)
    if len(shared) < MIN_SHARED and not common:
        have = "no layer in common" if _same_width(a, b) else f"hidden sizes {a.hidden_size} and {b.hidden_size}"
        raise InputError(
            f"{a.label} and {b.label} cannot be compared: {have}, and {len(shared)} archetypes with a role vector in both, "
            f"where correlations take {MIN_SHARED}"
        )
    places = [(a.layers.index(layer), b.layers.index(layer)) for layer in common] or list(
        enumerate(same_depth(a.layers, a.num_blocks, b.layers, b.num_blocks).tolist())
    )
    best_of_a = (a.best_place, b.layers.index(a.best_layer)) if a.best_layer in common else None
    return SpacePair(
        a=a,
        b=b,
        shared=shared,
        left_out=tuple(sorted(set(a.archetypes) ^ set(b.archetypes))),
        at_best=_layer_pair(a, b, shared, a.best_place, b.best_place),
        at_best_of_a=None if best_of_a is None else _layer_pair(a, b, shared, *best_of_a),
        layers=tuple(_layer_pair(a, b, shared, *pair) for pair in places),
        notes=tuple(_notes(a, b, shared, common)),
    )


def _at_layer(reduced: Reduced, codes: Sequence[int], place: int, num_components: int) -> tuple[Float64, Float64]:
    """Places along the axis (A,) and loadings (A, K) at one layer."""
    roles_AD = reduced.role_vector_ALD[codes, place].astype(np.float64)
    mean_D = roles_AD.mean(axis=0) if reduced.pca_mean_LD is None else reduced.pca_mean_LD[place].astype(np.float64)
    scale_D = np.ones_like(mean_D) if reduced.pca_scale_LD is None else reduced.pca_scale_LD[place].astype(np.float64)
    components_KD = reduced.pca_components_LKD[place, :num_components].astype(np.float64)
    return positions(roles_AD, reduced.axis_LD[place].astype(np.float64)), coordinates(roles_AD, mean_D, scale_D, components_KD)


def _with_variance(reduced: Reduced, num_wanted: int) -> int:
    """How many of the first components explain something at every layer: the direction of one that does not means nothing."""
    return int((reduced.pca_explained_variance_ratio_LK[:, :num_wanted] > NO_VARIANCE).sum(axis=1).min())


def _same_width(a: Space, b: Space) -> bool:
    return a.hidden_size == b.hidden_size


def _common_layers(a: Space, b: Space) -> tuple[int, ...]:
    """Layers at which directions of both live in the same space, as far as can be told."""
    return tuple(layer for layer in a.layers if layer in b.layers) if _same_width(a, b) else ()


def _layer_pair(a: Space, b: Space, shared: Sequence[str], place_a: int, place_b: int) -> LayerPair:
    num_components = min(a.num_components, b.num_components)
    axis_cosine = component_cosines = angles = None
    if _same_width(a, b) and a.layers[place_a] == b.layers[place_b]:
        ones_KD, others_KD = a.components_LKD[place_a, :num_components], b.components_LKD[place_b, :num_components]
        axis_cosine = float(cosines(a.axis_LD[None, place_a], b.axis_LD[None, place_b])[0])
        component_cosines = _unsigned_after_first(cosines(ones_KD, others_KD).tolist())
        angles = tuple(principal_angles(ones_KD, others_KD).tolist()) if num_components else ()
    position_pearson = position_spearman = loading_pearson = loading_spearman = None
    if len(shared) >= MIN_SHARED:
        at_a, at_b = [a.archetypes.index(name) for name in shared], [b.archetypes.index(name) for name in shared]
        position_pearson = pearson(a.position_AL[at_a, place_a], b.position_AL[at_b, place_b])
        position_spearman = spearman(a.position_AL[at_a, place_a], b.position_AL[at_b, place_b])
        pairs_K = [(a.loading_ALK[at_a, place_a, k], b.loading_ALK[at_b, place_b, k]) for k in range(num_components)]
        loading_pearson = _unsigned_after_first([pearson(*pair) for pair in pairs_K])
        loading_spearman = _unsigned_after_first([spearman(*pair) for pair in pairs_K])
    return LayerPair(
        layer_a=a.layers[place_a],
        layer_b=b.layers[place_b],
        axis_cosine=axis_cosine,
        component_cosines=component_cosines,
        principal_angles=angles,
        position_pearson=position_pearson,
        position_spearman=position_spearman,
        loading_pearson=loading_pearson,
        loading_spearman=loading_spearman,
    )


def _unsigned_after_first(values: Sequence[float]) -> tuple[float, ...]:
    """PC1 points to the default Assistant in every space; the sign of the others means nothing."""
    return tuple(value if k == 0 else abs(value) for k, value in enumerate(values))


def _notes(a: Space, b: Space, shared: Sequence[str], common: Sequence[int]) -> Iterator[str]:
    if not _same_width(a, b):
        yield (
            f"no cosines and angles: the hidden sizes are {a.hidden_size} and {b.hidden_size}, "
            "so directions of the two models cannot be held against each other; layers are paired by relative depth"
        )
    elif not common:
        yield f"no cosines and angles: no layer is in both; they have {list(a.layers)} and {list(b.layers)}; layers are paired by depth"
    elif a.model_id != b.model_id:
        yield f"cosines and angles mean something only if one of {a.model_id} and {b.model_id} was trained from the other"
    if common and a.best_layer not in common:
        yield f"nothing at the recommended layer of {a.label}: {b.label} lacks layer {a.best_layer}"
    if len(shared) < MIN_SHARED:
        yield f"no correlations: {len(shared)} archetypes have a role vector in both, and it takes {MIN_SHARED}"
    for space in () if common else (space for space in (a, b) if not space.is_depth_known):
        yield f"{space.label}: how many layers the model has is not recorded; its depth is counted to the last captured one"
    if a.num_components != b.num_components:
        fewest = min(a, b, key=lambda space: space.num_components)
        yield f"components compared: {fewest.num_components}, {fewest.label} has no more that explain anything"
    for name in SETTINGS:
        if a.settings[name] != b.settings[name]:
            yield f"{name} differs: {a.settings[name]} in {a.label}, {b.settings[name]} in {b.label}"
