"""The order in which rows are wanted, so that any prefix of a run is a valid smaller experiment.

In any prefix the counts per archetype, and per archetype and system prompt, differ by at most one, and no question comes
again before all were used. All archetypes walk the same path, so that they are compared on the same questions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator


def grid_walk(num_prompts: int, num_questions: int) -> Iterator[tuple[int, int]]:
    """Every (prompt, question) once: each block of `num_prompts` steps has all prompts, each of `num_questions` all questions.

    Diagonals of the grid: by the Chinese remainder theorem one diagonal covers it if the sizes are coprime; otherwise it closes
    after lcm steps, and the next one starts a question further.
    """
    period = math.lcm(num_prompts, num_questions)
    for step in range(num_prompts * num_questions):
        yield step % num_prompts, (step + step // period) % num_questions


def shuffled(num_items: int, seed: int) -> list[int]:
    """A fixed pseudo-random permutation (sorted by hash): neighbours in the catalogue share a theme, neighbours in the work should not."""
    return sorted(range(num_items), key=lambda item: hashlib.blake2b(f"{seed}/{item}".encode(), digest_size=8).digest())
