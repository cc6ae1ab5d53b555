"""`persona-ray reduce` and `judge`: what is made again from rows that are there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from persona_ray.cli import main
from persona_ray.errors import InputError
from persona_ray.reduce.axis import projections
from persona_ray.reduce.merging import in_process
from persona_ray.reduce.moments import Moments
from persona_ray.reduce.pca import principal_components
from persona_ray.reduce.tally import Tally
from persona_ray.reducing import is_reduced, measure_certainty, reduce_store, reduction_of_store, with_gpus
from persona_ray.scheduler.driver import cluster
from persona_ray.spec import Judgement
from persona_ray.store.checkpoint import checkpoint_arrays, checkpoints
from persona_ray.store.reader import StoreReader, open_store
from persona_ray.store.scores import ScoreWriter
from persona_ray.terminal import TerminalProgress
from tests.store.conftest import Toy

LEAST = ("--set", "reduce.min_count=2", "--set", "reduce.bootstrap=20")
QUIET = TerminalProgress(Console(quiet=True))
PROGRAM = [sys.executable, "-c", "from persona_ray.cli import main; main()"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def document(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = call(capsys, *arguments, "--json")
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.fixture
def store(tmp_path: Path) -> StoreReader:
    return open_store(Toy(rows=36, archetypes=("default", "bard", "sage")).fill(tmp_path / "store"))


@pytest.fixture
def lexicon(tmp_path: Path) -> Path:
    """Every toy answer is a bard's and a sage's own word."""
    own = {"group": "all", "words": ["aye"]}
    path = tmp_path / "lexicon.json"
    path.write_text(json.dumps({"archetypes": {"bard": own, "sage": own}, "groups": {"all": []}, "assistant_side": ["all"]}))
    return path


def test_judged_and_reduced_without_a_model(capsys: pytest.CaptureFixture[str], store: StoreReader, lexicon: Path) -> None:
    first = document(capsys, "reduce", store.url, *LEAST)
    assert store.latest_reduced() == first["name"]
    assert first["certainty"]["num_replicates"] == 20
    judged = document(capsys, "judge", store.url, "--backend", "lexicon", "--path", lexicon)
    assert store.latest_scores() == judged["judge"]
    assert judged["rows"] == {"-1": 12, "3": 24}
    second = document(capsys, "reduce", store.url, *LEAST)
    assert second["name"] != first["name"]
    assert store.reduced(second["name"]).attributes["judge"] == judged["judge"]
    coded = document(capsys, "reduce", store.url, "--set", "reduce.preset=published-code", "--set", "reduce.min_count=2", "--layers", "3")
    assert (coded["layers"][0]["layer"], len(coded["layers"])) == (3, 1)
    assert store.reduced(coded["name"]).attributes["preset"] == "published-code"
    # Back again: known by its name, only put in force.
    assert document(capsys, "reduce", store.url, *LEAST, "--judge", "none") == first
    assert store.latest_reduced() == first["name"]
    assert document(capsys, "axis", store.url)["layers"] == first["layers"]


def test_components_of_single_rollouts_incremental_and_exact(store: StoreReader, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows_NLD = np.concatenate([rows.activations_RLD for rows in store.scored_rows(sorted(store.ledger.committed()), None)])
    with cluster(None):
        few, exact, none = (
            reduce_store(store, reduction_of_store(store, ["reduce.min_count=2", f"reduce.{setting}"]), QUIET)
            for setting in ("rank=2", "exact_layers=[3]", "rollout_pca=none")
        )
        with pytest.raises(InputError, match=r"reduce\.device: cuda, and the cluster has no free GPU"):
            with_gpus(reduction_of_store(store, ["reduce.device=cuda"]))
        assert with_gpus(reduction_of_store(store)).num_gpus == 0
        # A judge that has scored a part: what follows from that part is not what follows from all.
        judge = ScoreWriter(store.url, "judge-1", {})
        names = []
        for units in (range(5), range(5, 9)):
            for unit in units:
                (rollouts,) = store.rollouts([unit])
                judge.write(unit, rollouts, [Judgement(3, "as told") for _ in rollouts])
            reduction = reduction_of_store(store, ["reduce.min_count=2", "reduce.bootstrap=0"], judge_name="judge-1")
            assert not is_reduced(store, reduction)
            names.append(reduce_store(store, reduction, QUIET).name)
            assert is_reduced(store, reduction)
        # Error bars that cannot be had are not tried again.
        one_question = open_store(Toy(rows=3).fill(tmp_path / "one-question"))
        reduction = reduction_of_store(one_question, ["reduce.min_count=1", "reduce.bootstrap=20"])
        reduced = reduce_store(one_question, reduction, QUIET)
        assert not is_reduced(one_question, reduction)
        assert measure_certainty(one_question, reduction, reduced, QUIET) is None
        assert is_reduced(one_question, reduction)
    assert "no error bars: the rows that count answer one question only" in caplog.text
    part, whole = map(store.reduced, names)
    assert (part.attributes["units_without_scores"], whole.attributes["units_without_scores"]) == (4, 0)
    assert part.role_count_A.tolist() < whole.role_count_A.tolist() == [12, 12, 12]
    assert none.rollout_pca_components_LKD is none.attributes["rollout_pca"] is None
    assert few.rollout_pca_components_LKD is not None
    assert few.rollout_pca_components_LKD.shape == (2, 2, 6)
    assert exact.attributes["rollout_pca"] == "all 36 stored rows, centred, incremental of rank 64; exact at layers [3]"
    expected = principal_components(rows_NLD.astype(np.float64), exact.axis_LD.astype(np.float64), 64)
    for found_values, expected_values in (
        (exact.rollout_pca_components_LKD, expected.components_LKD),
        (exact.rollout_pca_explained_variance_LK, expected.explained_variance_LK),
        (exact.rollout_pca_explained_variance_ratio_LK, expected.explained_variance_ratio_LK),
        (exact.rollout_pca_mean_LD, expected.mean_LD),
        (exact.cos_rollout_pc1_axis_L, projections(expected.components_LKD[None, :, 0], exact.axis_LD.astype(np.float64))[0]),
    ):
        np.testing.assert_allclose(found_values, expected_values, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--set", "reduce.exact_layers=[3,5]"), "reduce.exact_layers: [5] are not among the layers [0, 3]"),
        (("--set", "reduce.exact_layers=[3]", "--set", "reduce.rollout_pca=none"), "need rollout_pca: incremental"),
        (("--set", "store.url=elsewhere"), "only keys of reduce can be replaced here"),
        (("--set", "reduce.minimum=3"), "reduce.minimum: unknown key"),
        (("--layers", "3,x"), "expected decoder blocks"),
        (("--layers", "3,77"), "layer 77 was not captured; there are [0, 3]"),
        (("--judge", "nobody"), "no judge nobody has scored here"),
    ],
)
def test_wrong_input_to_reduce_is_one_line(
    capsys: pytest.CaptureFixture[str], store: StoreReader, arguments: tuple[str, ...], complaint: str
) -> None:
    code, out, err = call(capsys, "reduce", store.url, *arguments)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert complaint in err


def test_wrong_input_to_judge_is_one_line(capsys: pytest.CaptureFixture[str], store: StoreReader, tmp_path: Path) -> None:
    for arguments, complaint in (
        ((), "has no judge; name one with --backend"),
        (("--backend", "scores"), "backend scores needs a path"),
        (("--backend", "oracle"), "judge.backend"),
        (("--backend", "lexicon"), "comes without a lexicon"),
        (("--backend", "scores", "--path", tmp_path / "nowhere"), "is no folder"),
    ):
        code, _, err = call(capsys, "judge", store.url, *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert complaint in err
    assert store.latest_scores() is None


def test_killed_and_started_again_it_continues(tmp_path: Path) -> None:
    """A real kill in the middle of the pass; the second one starts from the last checkpoint and gives the same numbers."""
    url = Toy(rows=240, unit_rows=4).fill(tmp_path / "store")
    command = [*PROGRAM, "reduce", url, *LEAST, "--set", "reduce.checkpoint_rows=8", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    layers, deadline = Toy().layers, time.monotonic() + 120
    while len(checkpoints(url, layers)) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    store = open_store(url)
    assert store.latest_reduced() is None
    rows_kept = checkpoints(url, store.layers)[0].num_rows
    assert 24 <= rows_kept < 240

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"going on from the moments of {rows_kept} rows" in done.stderr
    kept = Tally.from_arrays(checkpoint_arrays(url, checkpoints(url, store.layers)[0])).moments
    plain = in_process(lambda units: store.scored_rows(units, None), sorted(store.ledger.committed()), Moments.of)
    assert kept.num_rows == plain.num_rows == 240
    for group, expected in plain.groups.items():
        np.testing.assert_allclose(kept.groups[group].mean_LD, expected.mean_LD, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(kept.groups[group].m2_LD, expected.m2_LD, rtol=1e-10)
