"""Vectors to steer by: multiples of the axis, and random ones of the same length to compare with. numpy only."""

from __future__ import annotations

import numpy as np

from persona_ray.spec import Float32


def multiple(axis_D: Float32, strength: float) -> Float32:
    """`strength` x axis: positive is toward the Assistant."""
    return (axis_D * strength).astype(np.float32)


def random_direction(axis_D: Float32, seed: int) -> Float32:
    """A direction drawn evenly from the sphere of the axis's norm; equal seed, equal direction."""
    drawn_D = np.random.default_rng(seed).standard_normal(len(axis_D))
    return (drawn_D * (np.linalg.norm(axis_D) / np.linalg.norm(drawn_D))).astype(np.float32)
