"""The command line: parses, calls, prints. What a command does lives elsewhere.

Exit codes: 0 done, 1 failed at work, 2 wrong input (one line, nothing was begun), 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from persona_ray.bench.command import with_settings
from persona_ray.bench.settings import Settings
from persona_ray.cli_cluster import MaybeAddress, RunOrStore, cluster_app, store_of
from persona_ray.cli_project import project_app
from persona_ray.cli_results import results_app
from persona_ray.cli_store import AsJson, StoreUrl, store_app
from persona_ray.config import Job, job_schema, load_job
from persona_ray.errors import EXIT_DONE, EXIT_FAILED, EXIT_INPUT, EXIT_INTERRUPTED, InputError, PersonaRayError
from persona_ray.logs import log_to
from persona_ray.terminal import show

if TYPE_CHECKING:
    from persona_ray.pipeline import Outcome

UsageError: Any = typer.BadParameter.__mro__[1]
"""What the parser raises for a wrong command line; the class has no public name of its own."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Extract the persona space of a language model: rollouts, activations, the Assistant Axis.",
)
app.add_typer(store_app, name="store")
app.add_typer(results_app)
app.add_typer(project_app)
app.add_typer(cluster_app)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder for the store and the report.")] = Path("persona-ray-quickstart"),
    show: Annotated[bool | None, typer.Option("--open/--no-open", help="Open the page. Default: on a desktop, yes.")] = None,
    as_json: AsJson = False,
) -> None:
    """The whole path on this machine with the shipped tiny model: rollouts, activations, axis, steering check, report.

    Example: persona-ray quickstart --out /tmp/first-look
    """
    with as_file(files("persona_ray") / "data" / "quickstart.yaml") as path:
        job = load_job(path, [f"store.url={json.dumps(str(out / 'store'))}"])
    page = _run(job, out / "report.html", address=None, as_json=as_json)
    if show or (show is None and not as_json and _is_desktop()):
        typer.launch(page.absolute().as_uri())


@app.command()
def run(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML); its keys: persona-ray schema.")],
    address: Annotated[str | None, typer.Option(help="Ray cluster: auto, or host:port of its head. Default: a local one.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job.")] = None,
    report: Annotated[Path | None, typer.Option(help="HTML file. Default: NAME-report.html in the current folder.")] = None,
    log: Annotated[Path | None, typer.Option(help="File to which every lease, loss and refusal is appended, as JSON lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a job, or resume it: what is committed is never done again.

    Example: persona-ray run jobs/quickstart.yaml --set shards.stages=1
    """
    loaded = load_job(job, overrides or [])
    if log is not None:
        log_to(log, loaded.name)
    _run(loaded, report or Path(f"{loaded.name}-report.html"), address=address, as_json=as_json)


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML); its keys: persona-ray schema.")],
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job.")] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option("--assume", metavar="NAME=NUMBER", help="Replace an assumption, e.g. answer_tokens=300, gpu_hour=2.5."),
    ] = None,
    bench: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speed as measured: what persona-ray bench --json has printed for this model.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a job asks for, how its model is cut over GPUs, and what it will cost. Needs neither a cluster nor the weights.

    Example: persona-ray plan jobs/qwen3-4b.yaml --set shards.accelerator=H100 --set shards.stages=auto --assume gpu_hour=2.5
    """
    from persona_ray.costs.estimate import estimate
    from persona_ray.planning import prepare
    from persona_ray.report.costs import costs_table
    from persona_ray.report.plan import plan_table

    setup = prepare(load_job(job, overrides or []))
    facts = setup.facts()
    costs = estimate(setup, assume=assume or [], bench=bench).facts()
    show(facts | {"costs": costs}, plan_table(facts), costs_table(costs), as_json=as_json)


@app.command()
def axis(
    store: StoreUrl, top: Annotated[int, typer.Option(min=1, help="Archetypes shown at each end.")] = 10, as_json: AsJson = False
) -> None:
    """The Assistant Axis of a store: its numbers by layer, and the archetypes along it.

    Example: persona-ray axis persona-ray-quickstart/store
    """
    from persona_ray.report.certainty import sentences
    from persona_ray.report.from_store import report_data
    from persona_ray.report.tables import axis_json, axis_table
    from persona_ray.store.reader import open_store

    data = report_data(open_store(store))
    certainty = {"certainty": None if data.certainty is None else asdict(data.certainty)}
    said = [] if data.certainty is None else ["\n".join(sentences(data.certainty))]
    show(axis_json(data.reduced) | certainty, axis_table(data.reduced, top), *said, as_json=as_json)


@app.command("report")
def write_report(
    target: RunOrStore,
    address: MaybeAddress = None,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    compare: Annotated[list[str] | None, typer.Option(metavar="OTHER", help="Another STORE, or STORE@NAME; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of a store, or of a run's: one HTML file that needs no network.

    --compare draws its archetypes against those of other stores.

    Example: persona-ray report persona-ray-quickstart/store --out axis.html
    """
    page = _write_page(store_of(target, address), out, compare or [])
    show({"report": str(page)}, f"report: {page}", as_json=as_json)


@app.command("verify-model")
def verify_model_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub name, local folder, or builtin:tiny-persona.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    stages: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Ranks of each stage.")] = 1,
    transport: Annotated[str, typer.Option(help="object-store, gloo or nccl.")] = "object-store",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16. float32 shows the smallest faults.")] = "float32",
    attention: Annotated[str, typer.Option(help="auto, eager, sdpa or flash_attention_2.")] = "auto",
    gpus_per_shard: Annotated[float, typer.Option(min=0, help="GPUs of each shard.")] = 1,
    cpu: Annotated[bool, typer.Option("--cpu", help="The same as --gpus-per-shard 0.")] = False,
    kind: Annotated[str, typer.Option(help="instruct or base. A base model is only read, not continued.")] = "instruct",
    address: Annotated[str | None, typer.Option(help="Ray cluster: auto, or host:port of its head. Default: a local one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Is the planned cut right? A dozen conversations through it, and through plain transformers in this process.

    The reference takes this process's GPU if there is one, and needs room for the whole model. Exit code 1: the cut is wrong.

    Example: persona-ray verify-model builtin:tiny-persona --stages 2 --cpu
    """
    try:
        from persona_ray.verify.model import settings, verify_model
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; running a model needs the engine: pip install 'persona-ray[engine]'") from error
    from persona_ray.verify.tables import verdict_json, verdict_table

    model_config, shards = settings(
        {"id": model, "revision": revision, "dtype": dtype, "attention": attention, "kind": kind},
        {"stages": stages, "tensor_parallel": tensor_parallel, "transport": transport, "gpus_per_shard": 0 if cpu else gpus_per_shard},
    )
    console = Console(stderr=True, quiet=as_json)
    verdict = verify_model(model_config, shards, address=address, tell=lambda line: console.print(line, markup=False))
    show(verdict_json(verdict), verdict_table(verdict), as_json=as_json)
    if not verdict.is_right:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def schema() -> None:
    """Print the job file's JSON Schema, for editors and checks.

    Example: persona-ray schema > job.schema.json
    """
    print(json.dumps(job_schema(), indent=2))


@app.command()
@with_settings
def bench(*, as_json: AsJson = False, **settings: Any) -> None:
    """How fast the engine is here, beside a plain loop measured in the same run. Takes minutes; nothing is kept.

    Example: persona-ray bench --random hidden=512,layers=12,vocab=32000 --stages 2
    """
    wanted = Settings(**settings)
    try:
        from persona_ray.bench.report import lines
        from persona_ray.bench.run import benchmark
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; running a model needs the engine: pip install 'persona-ray[engine]'") from error
    console = Console(stderr=True, quiet=as_json)
    document = benchmark(wanted, lambda line: console.print(line, markup=False))
    show(document, *lines(document), as_json=as_json)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: turns errors into one line and an exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("persona_ray").setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(arguments, prog_name="persona-ray", standalone_mode=False)
    except UsageError as error:
        code = _complain(f"{error.format_message()} (see persona-ray --help)", EXIT_INPUT)
    except PersonaRayError as error:
        code = _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED:  # the parser answers with this code, too, when it was interrupted
        again = shlex.join([_command(), *arguments])
        _complain(f"interrupted; what is committed is safe, and the same command resumes: {again}", EXIT_INTERRUPTED)
    sys.exit(code if isinstance(code, int) else EXIT_DONE)


def _run(job: Job, report: Path, *, address: str | None, as_json: bool) -> Path:
    """Run the job and write its report; answers the page."""
    try:
        from persona_ray import pipeline
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; running a job needs the engine: pip install 'persona-ray[engine]'") from error
    from persona_ray.terminal import TerminalProgress

    _require_writable(report)
    console = Console(stderr=True, quiet=as_json)
    outcome = pipeline.run(job, TerminalProgress(console), address=address)
    page = _write_page(outcome.store_url, report)
    _summary(outcome, page, as_json=as_json)
    return page


def _command() -> str:
    """How to call this program from here: it may live in a virtual environment that is not active."""
    return "persona-ray" if shutil.which("persona-ray") else sys.argv[0]


def _is_desktop() -> bool:
    """Somebody sits at a screen: a terminal, and a display to open a page on."""
    has_display = sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    return has_display and sys.stdout.isatty()


def _write_page(url: str, out: Path, compared: Sequence[str] = ()) -> Path:
    from persona_ray.comparing import compare_with
    from persona_ray.report.from_store import report_data
    from persona_ray.report.page import render_page
    from persona_ray.store.reader import open_store

    _require_writable(out)
    store = open_store(url)
    page = render_page(report_data(store, compare_with(store, compared)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _require_writable(out: Path) -> None:
    """A report that cannot be written is known before the work, not after it."""
    existing = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    is_free = existing.is_file() if existing == out.absolute() else existing.is_dir()
    if not is_free or not os.access(existing, os.W_OK):
        raise InputError(f"{out}: not a file that can be written")


def _summary(outcome: Outcome, page: Path, *, as_json: bool) -> None:
    from persona_ray.report.certainty import sentences
    from persona_ray.report.tables import axis_json, axis_table, run_table, steering_json, steering_table
    from persona_ray.report.words import names, percent

    counts = outcome.counts
    run_facts: dict[str, Any] = {
        "rows": {"asked": counts.asked, "stored": counts.stored, "refused": counts.refused, "reasons": counts.reasons},
        "seconds": dict(outcome.seconds),
    }
    extra = outcome.extra
    facts = {
        **run_facts,
        "extra": None if extra is None else {**asdict(extra.counts), "archetypes": dict(extra.reasons)},
        "store_url": outcome.store_url,
        "units_done": outcome.units_done,
        "stopped": outcome.stopped,
        "has_converged": outcome.has_converged,
        "units_double": outcome.num_double,
        "axis": axis_json(outcome.reduced),
        "certainty": None if outcome.certainty is None else asdict(outcome.certainty),
        "steering": None if outcome.steering is None else steering_json(outcome.steering),
        "report": str(page),
    }
    parts: list[Any] = [axis_table(outcome.reduced, top=5)]
    if extra is not None:
        parts.append(f"Extra rows: {extra.counts.stored:,} for {names(tuple(extra.reasons))}.")
    if outcome.certainty is not None:
        parts.append("\n".join(sentences(outcome.certainty)))
    if outcome.steering is not None:
        parts.append(steering_table(outcome.steering))
    resumed = "" if outcome.units_done else "Everything was there already; nothing was generated again.\n"
    if outcome.stopped:
        share = f"after {percent((counts.stored + counts.refused) / counts.asked)} of the job's rows"
        resumed = f"stopped {share} by {outcome.stopped}{'' if outcome.has_converged else '; the same command goes on from here'}\n"
    if outcome.num_double:
        double = percent(outcome.num_double / outcome.units_done)
        resumed += (
            f"{outcome.num_double:,} units ({double} of what was left to do) were computed here and by another run at the same time\n"
        )
    following = f"{resumed}\nstore    {outcome.store_url}\nreport   {page}\nnext     {_command()} axis {shlex.quote(outcome.store_url)}"
    show(facts, *parts, run_table(run_facts), following, as_json=as_json)


def _complain(text: str, code: int) -> int:
    print(f"persona-ray: {' '.join(text.split())}", file=sys.stderr)
    return code
