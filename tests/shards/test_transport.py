"""Hidden states cross processes bit by bit, whatever their dtype."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from persona_ray.shards.transport import to_array, to_tensor

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_round_trip_is_bit_exact(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.1, -0.0, 3.0e38], [float("inf"), 1e-40, -7.25]]).to(dtype)
    array = to_array(values)
    assert array.dtype == (np.uint16 if dtype is torch.bfloat16 else to_array(torch.zeros(1, dtype=dtype)).dtype)
    back = to_tensor(pickle.loads(pickle.dumps(array)), CPU)
    assert back.dtype is dtype
    assert torch.equal(back, values)


def test_a_view_does_not_carry_its_storage() -> None:
    view = torch.zeros(1000, 1000)[:1, :1]
    assert len(pickle.dumps(to_array(view))) < 1000


def test_arrays_from_the_object_store_are_read_only_and_stay_as_they_are() -> None:
    array = np.arange(4, dtype=np.float32)
    array.flags.writeable = False
    tensor = to_tensor(array, CPU)
    tensor += 1
    assert array.tolist() == [0, 1, 2, 3]


def test_token_ids_stay_integers() -> None:
    ids = np.array([[5, 7]], dtype=np.int32)
    assert to_tensor(ids, CPU).dtype is torch.int32
