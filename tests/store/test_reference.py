from __future__ import annotations

import pytest

from persona_ray.errors import InputError
from persona_ray.store.reference import split_reference


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("store", ("store", None)),
        ("/data/store@0123abcd", ("/data/store", "0123abcd")),
        ("s3://team/qwen3-32b@0123abcd", ("s3://team/qwen3-32b", "0123abcd")),
        ("runs@home/store", ("runs@home/store", None)),
        ("store@home/", ("store@home/", None)),
        ("store@home@0123abcd", ("store@home", "0123abcd")),
    ],
)
def test_a_reference_is_a_place_and_perhaps_a_name(reference: str, expected: tuple[str, str | None]) -> None:
    assert split_reference(reference) == expected


@pytest.mark.parametrize("reference", ["@name", "store@"])
def test_half_a_reference_is_wrong_input(reference: str) -> None:
    with pytest.raises(InputError, match="expected STORE, or STORE@NAME"):
        split_reference(reference)
