"""Which decoder blocks go to which stage. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable

from persona_ray.errors import InputError


def cut_layers(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """Half-open layer ranges of the stages, as even as whole blocks allow, longer ones first.

    Raises InputError if there are more stages than layers.
    """
    if num_stages > num_layers:
        raise InputError(f"shards.stages: {num_stages} stages for {num_layers} layers; a stage needs at least one layer")
    size, rest = divmod(num_layers, num_stages)
    ends = [size * (stage + 1) + min(stage + 1, rest) for stage in range(num_stages)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def layers_to_capture(num_layers: int, wanted: Iterable[int]) -> tuple[int, ...]:
    """The wanted layers, ascending, each once. Raises InputError for a layer that the model does not have."""
    layers = tuple(sorted(set(wanted)))
    wrong = [layer for layer in layers if not 0 <= layer < num_layers]
    if wrong or not layers:
        raise InputError(f"capture.layers: {wrong or 'an empty list'}; this model has layers 0 to {num_layers - 1}")
    return layers
