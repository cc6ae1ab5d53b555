from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from persona_ray.errors import IntegrityError, NothingUsableError
from persona_ray.reduce.merging import in_process
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.tasks import on_cluster, slice_size
from persona_ray.spec import ScoredRows


def random_units(units: Sequence[int]) -> Iterator[ScoredRows]:
    for unit in units:
        generator = np.random.default_rng(unit)
        number = 1 + unit % 5
        yield ScoredRows(
            rollout_R=np.arange(number),
            archetype_R=generator.integers(0, 3, number).astype(np.int32),
            score_R=generator.integers(-1, 4, number).astype(np.int8),
            activations_RLD=generator.standard_normal((number, 2, 4)).astype(np.float32),
        )


def broken_units(units: Sequence[int]) -> Iterator[ScoredRows]:
    for unit, rows in zip(units, random_units(units), strict=True):
        if unit == 3:
            rows.activations_RLD[0, 1, 2] = np.nan
        yield rows


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The tests' functions live in a file that workers cannot import by name.
    ray.cloudpickle.register_pickle_by_value(__import__("sys").modules[__name__])
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.parametrize(("num_units", "num_tasks"), [(1, 4), (11, 3), (16, 4), (7, 100)])
def test_parallel_equals_serial_bit_by_bit(num_units: int, num_tasks: int) -> None:
    told: list[int] = []
    units = list(range(5, 5 + num_units))
    parallel, serial = on_cluster(random_units, units, Moments.of, num_tasks, told.append), in_process(random_units, units, Moments.of)
    assert sum(told) == num_units
    assert set(parallel.groups) == set(serial.groups)
    for group, expected in serial.groups.items():
        assert parallel.groups[group].count == expected.count
        np.testing.assert_array_equal(parallel.groups[group].mean_LD, expected.mean_LD)
        np.testing.assert_array_equal(parallel.groups[group].m2_LD, expected.m2_LD)


def test_a_bad_row_is_named_as_in_one_process() -> None:
    with pytest.raises(IntegrityError) as alone:
        in_process(broken_units, range(6), Moments.of)
    with pytest.raises(IntegrityError) as in_tasks:
        on_cluster(broken_units, range(6), Moments.of, 2)
    assert str(in_tasks.value) == str(alone.value)


def test_no_units_is_an_error_in_words() -> None:
    with pytest.raises(NothingUsableError, match="not one unit"):
        on_cluster(random_units, [], Moments.of, 2)


@given(num_units=st.integers(1, 5000), num_tasks=st.integers(1, 300))
def test_slices_are_powers_of_two_and_no_more_than_tasks(num_units: int, num_tasks: int) -> None:
    size = slice_size(num_units, num_tasks)
    assert size & (size - 1) == 0
    assert -(-num_units // size) <= num_tasks
    assert size == 1 or -(-num_units // (size // 2)) > num_tasks
