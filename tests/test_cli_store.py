"""`persona-ray store` from the command line, on a small store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from persona_ray.cli import main
from persona_ray.store.finish import finish_store
from tests.store.conftest import Toy

REFUSED = {1: "empty answer"}


def call(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def store(tmp_path: Path) -> Path:
    toy = Toy()
    toy.fill(tmp_path / "stores/one", refused=REFUSED)
    finish_store(str(tmp_path / "stores/one"))
    return tmp_path / "stores/one"


def test_info_for_people_and_for_machines(capsys: pytest.CaptureFixture[str], store: Path) -> None:
    code, out, _ = call(capsys, "store", "info", store)
    assert code == 0
    for words in ("10 planned, 9 stored, 1 refused", "1 x empty answer", "3 of 3 committed", "cost of 1,000 rows", "no judge yet"):
        assert words in out
    code, out, _ = call(capsys, "store", "info", store, "--json")
    assert json.loads(out)["rows"]["stored"] == 9


def test_a_state_is_cited_and_opened_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    toy, url = Toy(), tmp_path / "s"
    toy.fill(url, units=range(1))
    digest = json.loads(call(capsys, "store", "info", url, "--cite", "--json")[1])["ledger_digest"]
    toy.fill(url)
    assert json.loads(call(capsys, "store", "info", url, "--json")[1])["units"]["committed"] == 3
    then = json.loads(call(capsys, "store", "info", url, "--at", digest, "--json")[1])
    assert (then["units"]["committed"], then["ledger_digest"]) == (1, digest)


def test_ls_copy_and_diff(capsys: pytest.CaptureFixture[str], store: Path, tmp_path: Path) -> None:
    code, out, _ = call(capsys, "store", "ls", tmp_path, "--json")
    assert code == 0
    assert str(store) in out
    copied = tmp_path / "stores/two"
    assert call(capsys, "store", "copy", store, copied)[0] == 0
    assert call(capsys, "store", "diff", store, copied)[0] == 0
    part = tmp_path / "part"
    assert call(capsys, "store", "copy", store, part, "--layers", "3", "--archetypes", "default,bard")[0] == 0
    info = json.loads(call(capsys, "store", "info", part, "--json")[1])
    assert (info["layers"], info["archetypes"]) == ([3], ["default", "bard"])
    assert call(capsys, "store", "diff", store, part)[0] == 1
    (store / "activations/c/1/0/0").write_bytes(b"x")
    code, out, _ = call(capsys, "store", "copy", store, tmp_path / "three")
    assert code == 1
    assert "activations/c/1/0/0" in out
    code, _, err = call(capsys, "store", "copy", store, tmp_path / "four", "--layers", "a")
    assert (code, err.count("\n")) == (2, 1)


@pytest.mark.parametrize("layout", ["published", "dataset", "icechunk"])
def test_exports(capsys: pytest.CaptureFixture[str], tmp_path: Path, layout: str) -> None:
    class Unique(Toy):
        """One sample of each question: what the published layout can hold."""

        @property
        def plan(self) -> Any:
            from dataclasses import replace

            plan = super().plan
            return replace(plan, keys=tuple(replace(key, sample=0) for key in plan.keys))

    Unique().fill(tmp_path / "store", refused=REFUSED)
    code, out, _ = call(capsys, "store", "export", tmp_path / "store", tmp_path / "out", "--format", layout, "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["rows"] == 9
    assert all((tmp_path / "out" / file).is_file() for file in facts["files"])
    code, out, err = call(capsys, "store", "export", tmp_path / "store", tmp_path / "out", "--format", layout)
    assert (code, out, err.count("\n")) == (2, "", 1)
    if layout == "published":
        code, out, _ = call(capsys, "store", "import", tmp_path / "out", tmp_path / "again", "--model", "toy/model")
        assert code == 0
        assert "9 rows" in out
        assert call(capsys, "store", "verify", tmp_path / "again")[0] == 0
