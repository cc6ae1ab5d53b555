"""The architecture, held by a test: who may import whom, and what a laptop never loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import persona_ray

ROOT = Path(persona_ray.__file__).parent
SIBLINGS = {"catalog", "rollouts", "shards", "store", "judge", "scheduler", "reduce", "steer"}
BASE = {"errors", "spec", "config", "metrics", "logs"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "metrics": set(),
    "logs": {"errors"},
    "spec": {"errors"},
    "config": {"errors", "spec"},
    **dict.fromkeys(SIBLINGS, BASE),
    "report": BASE | SIBLINGS,
    "serve": BASE | SIBLINGS,
    "verify": BASE | SIBLINGS,
    "bench": BASE | SIBLINGS,
    "bench_store": BASE | {"store"},
    "terminal": BASE,
    "interrupt": set(),
    "planning": BASE | SIBLINGS,
    "costs": BASE | SIBLINGS | {"planning"},
    "following": set(),
    "accumulating": BASE | SIBLINGS | {"following"},
    "reducing": BASE | SIBLINGS | {"accumulating"},
    "stopping": BASE | SIBLINGS | {"following"},
    "judging": BASE | SIBLINGS,
    "extra": BASE | SIBLINGS | {"planning"},
    "comparing": BASE | SIBLINGS,
    "projecting": BASE | SIBLINGS,
    "pipeline": BASE
    | SIBLINGS
    | {"planning", "costs", "accumulating", "reducing", "stopping", "judging", "extra", "interrupt", "report", "serve"},
    "submit": BASE | {"store"},
    "cli_store": BASE | SIBLINGS | {"report", "terminal"},
    "cli_results": BASE | SIBLINGS | {"report", "terminal", "planning", "reducing", "judging", "comparing", "cli_store"},
    "cli_project": BASE | SIBLINGS | {"report", "terminal", "planning", "projecting", "pipeline", "cli_store", "cli_results"},
    "cli_cluster": BASE | {"report", "terminal", "submit", "cli_store"},
    "cli": BASE
    | SIBLINGS
    | {"report", "serve", "verify", "bench", "terminal", "planning", "costs", "pipeline", "comparing"}
    | {"cli_store", "cli_cluster", "cli_results", "cli_project"},
    "__main__": {"cli"},
}
"""Part -> the parts that it may import. One way only:
errors <- spec <- config <- {siblings} <- {report, serve, planning, accumulating, reducing, stopping, judging} <- pipeline <- cli."""

HOMES: dict[str, set[str]] = {
    "ray": {"shards/actors", "scheduler/driver.py", "reduce/tasks.py", "submit.py"},
    "torch": {
        "shards",
        "steer",
        "verify/reference.py",
        "bench/floor.py",
        "bench/model.py",
        "bench/device.py",
        "reduce/gpu.py",
        "store/exchange",
        "store/rows.py",
    },
    "zarr": {"store"},
    "obstore": {"store"},
    "plotly": {"report"},
}
"""Heavy package -> files and folders that may import it."""


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """(part, file, syntax tree) of every module."""
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT)
        part = file.parts[0].removesuffix(".py")
        yield part, file.as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that the module imports, lazily or not; those for type checkers alone are left out."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide arrows"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_point_one_way() -> None:
    arrows: set[tuple[str, str]] = set()
    wrong: list[str] = []
    for part, file, tree in modules():
        if file == "__init__.py":
            continue
        assert part in ALLOWED, f"{file}: a part that the layout does not know; say where it belongs"
        for name in imported(tree):
            package, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if package != "persona_ray" or target == part:
                continue
            if target == "__version__" or not target:
                continue
            arrows.add((part, target))
            if target not in ALLOWED[part]:
                wrong.append(f"{file} imports {name}")
    print("\n".join(f"{source} -> {target}" for source, target in sorted(arrows)))
    assert len(arrows) > 20
    assert not wrong


@pytest.mark.parametrize("package", list(HOMES))
def test_heavy_packages_stay_where_they_belong(package: str) -> None:
    users = [file for _, file, tree in modules() if any(name.split(".")[0] == package for name in imported(tree))]
    assert users
    assert not [file for file in users if not any(file == home or file.startswith(f"{home}/") for home in HOMES[package])]


def python(code: str, *, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter in which the packages of `without` cannot be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({list(without)!r}))\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


HEAVY = ("torch", "ray", "transformers", "zarr", "plotly")


@pytest.mark.parametrize(
    "code",
    [
        "import persona_ray",
        "from persona_ray.cli import app\nfrom typer.testing import CliRunner\nassert CliRunner().invoke(app, ['--help']).exit_code == 0",
    ],
)
def test_the_front_door_loads_nothing_heavy(code: str) -> None:
    loaded = python(f"{code}\nimport sys\nprint([name for name in {HEAVY!r} if name in sys.modules])")
    assert loaded.stdout.splitlines()[-1] == "[]"


def test_a_laptop_needs_no_torch() -> None:
    """Everything but running a model works where torch and transformers are not installed; running says what is missing."""
    code = """
import sys
from persona_ray.cli import main
import persona_ray.report.page, persona_ray.report.from_store, persona_ray.store.reader
for arguments, code in ((["schema"], 0), (["axis", "/nowhere"], 2), (["quickstart", "--out", "/nowhere/x"], 2)):
    try:
        main(arguments)
    except SystemExit as end:
        assert end.code == code, (arguments, end.code)
"""
    done = python(code, without=("torch", "transformers"))
    assert "pip install 'persona-ray[engine]'" in done.stderr


def test_a_laptop_reads_a_store_and_makes_its_report(tmp_path: Path) -> None:
    """A store with a result, and no torch to read it with."""
    store, page = tmp_path / "store", tmp_path / "report.html"
    code = f"""
import sys
sys.path.insert(0, {str(ROOT.parent)!r})
from persona_ray.cli import main
from persona_ray.store.reader import open_store
from tests.store.conftest import Toy
from tests.store.exchange.conftest import judge_all, reduce_all
store = open_store(Toy(rows=60, unit_rows=5, archetypes=("default", "bard", "sage", "pirate")).fill({str(store)!r}))
judge_all(store)
reduce_all(store)
for command in (["report", store.url, "--out", {str(page)!r}], ["axis", store.url], ["status", store.url], ["store", "info", store.url],
                ["store", "verify", store.url], ["project", store.url]):
    try:
        main([*command, "--json"])
    except SystemExit as end:
        assert not end.code, (command, end.code)
"""
    python(code, without=("torch", "transformers"))
    assert "<html" in page.read_text(encoding="utf-8")


def test_a_laptop_can_plan(tmp_path: Path) -> None:
    """Cutting a model needs its config, not its weights, and neither torch nor Ray; nor does telling what it will cost."""
    code = f"""
from persona_ray.cli import main
from persona_ray.data import __path__ as data
main(["plan", data[0] + "/quickstart.yaml", "--set", "store.url={tmp_path / "store"}", "--json"])
"""
    done = python(code, without=("torch", "ray"))
    assert '"flops_percent"' in done.stdout
    assert '"prefill_flops"' in done.stdout
