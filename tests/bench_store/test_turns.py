from __future__ import annotations

from collections.abc import Callable

from persona_ray.bench_store.turns import Took, compared, in_turns


def test_turns_alternate() -> None:
    order: list[str] = []

    def contestant(name: str) -> Callable[[int], Took]:
        return lambda turn: order.append(f"{name}{turn}") or Took(1e6, 1.0, 0.5)

    took = in_turns(2, {"a": contestant("a"), "b": contestant("b")})
    assert order == ["a0", "b0", "b1", "a1"]
    assert compared(took["a"], [Took(1e6, 0.5, 0.5)] * 2)["over_bare"] == 0.5
