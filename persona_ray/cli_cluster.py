"""Runs on a cluster, from any machine that sees it, or only their store: parses, calls, prints.

What a command does lives in `submit` and `report.watch`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from persona_ray.cli_store import AsJson
from persona_ray.config import load_job
from persona_ray.errors import EXIT_FAILED, EXIT_INTERRUPTED, InputError
from persona_ray.terminal import show

if TYPE_CHECKING:
    from persona_ray.report.watch import Watched
    from persona_ray.submit import Cluster

cluster_app = typer.Typer(rich_markup_mode=None)

Address = Annotated[str, typer.Option(metavar="URL", help="Dashboard of the cluster's head, such as http://head:8265.")]
MaybeAddress = Annotated[str | None, typer.Option(metavar="URL", help="For a run: dashboard of the cluster's head.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="What submit has answered.")]
RunOrStore = Annotated[str, typer.Argument(metavar="RUN|STORE", help="A run's name (with --address), or folder or URL of a store.")]


@cluster_app.command()
def submit(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML); its keys: persona-ray schema.")],
    address: Address,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a key of the job.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start a job on a Ray cluster, or resume it there; answers the run's name at once. The lid may then be closed.

    The job file and this version of the package travel; credentials do not. RAY_AUTH_TOKEN holds the cluster's token, if it has one.

    Example: persona-ray submit jobs/qwen3-4b.yaml --address http://head:8265 --set store.url=s3://team/qwen3-4b
    """
    from persona_ray.submit import Cluster, travelling

    loaded = travelling(load_job(job, overrides or []), address)
    cluster = Cluster(address)
    run = cluster.submit(loaded)
    facts = {"run": run, "address": cluster.address, "store": loaded.store.url}
    show(facts, f"run      {run}\nstore    {loaded.store.url}\nnext     {_command('watch', run, cluster.address)}", as_json=as_json)


@cluster_app.command()
def status(target: RunOrStore, address: MaybeAddress = None, as_json: AsJson = False) -> None:
    """How a run or a store is now: rows done and refused, speed, hardware, time left. Of a store alone, no cluster is asked.

    Example: persona-ray status s3://team/qwen3-4b
    """
    from persona_ray.report.watch import status_table

    facts = _watched(target, address).look()
    show(facts, status_table(facts), as_json=as_json)


@cluster_app.command()
def watch(
    target: RunOrStore,
    address: MaybeAddress = None,
    interval: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks.")] = 5.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how a run or a store goes on, until it ends: a run with its driver, a store with its last row. Exit code 1: the run failed.

    Ctrl-C ends the watching only. With --json: nothing until the end, then the last look.

    Example: persona-ray watch qwen3-4b-1f0c9a77 --address http://head:8265
    """
    from persona_ray.report.watch import status_table
    from persona_ray.report.watch import watch as watch_it

    watched = _watched(target, address)
    if once:
        facts = watched.look()
        show(facts, status_table(facts), as_json=as_json)
    else:
        with _only_looking(target, address):
            facts = watch_it(watched, Console(quiet=as_json), interval)
        if as_json:
            show(facts, as_json=True)
    if facts["has_failed"]:
        raise typer.Exit(EXIT_FAILED)


@cluster_app.command()
def logs(
    run: Run,
    address: Address,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends. Ctrl-C ends the looking only.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a run has said.

    Example: persona-ray logs qwen3-4b-1f0c9a77 --address http://head:8265 --follow
    """
    from persona_ray.submit import Cluster

    if follow and as_json:
        raise InputError("--json is one document, and --follow has no end before the run's; leave one of them out")
    cluster = Cluster(address)
    if follow:
        with _only_looking(run, address):
            cluster.follow(run, lambda piece: typer.echo(piece, nl=False))
    else:
        text = cluster.logs(run)
        show({"run": run, "logs": text}, text.rstrip("\n"), as_json=as_json)


@cluster_app.command()
def stop(run: Run, address: Address, as_json: AsJson = False) -> None:
    """Stop a run: it finishes what is under way, commits it and ends. What is committed stays, and submit resumes it.

    Example: persona-ray stop qwen3-4b-1f0c9a77 --address http://head:8265
    """
    from persona_ray.submit import DRAIN_S, Cluster

    cluster = Cluster(address)
    was_running = cluster.stop(run)
    state = cluster.run(run)
    first = (
        f"{run} is asked to stop: it may take {DRAIN_S / 60:g} minutes to finish what is under way"
        if was_running
        else f"{run} had ended before: {state.state.lower()}"
    )
    following = f"What is committed is safe. The same job file resumes it: persona-ray submit JOB --address {shlex.quote(cluster.address)}"
    show({"run": run, "was_running": was_running, "state": state.state, "store": state.store_url}, first, following, as_json=as_json)


def store_of(target: str, address: str | None) -> str:
    """Where the run `target` on the cluster at `address` writes; without an address the target is a store itself.

    Raises InputError if it is neither.
    """
    cluster = _cluster_of(target, address)
    if cluster is None:
        return target
    store_url = cluster.run(target).store_url
    if store_url is None:
        raise InputError(f"{target}: this run does not say where its store is; name the store itself, without --address")
    return store_url


def _cluster_of(target: str, address: str | None) -> Cluster | None:
    """With an address the target is a run of that cluster, without one a store (None)."""
    if address is None:
        if "/" not in target and ":" not in target and not Path(target).exists():
            raise InputError(f"{target}: no folder or URL of a store; for a run say where: --address http://head:8265")
        return None
    if "/" in target:
        raise InputError(f"{target} is a store, and --address belongs to a run's name; leave it out")
    from persona_ray.submit import Cluster

    return Cluster(address)


def _watched(target: str, address: str | None) -> Watched:
    from persona_ray.report.watch import Watched

    cluster = _cluster_of(target, address)
    if cluster is None:
        return Watched(store_url=target)

    def ask() -> dict[str, Any]:
        state = asdict(cluster.run(target))
        return {**state, "store": state.pop("store_url"), "address": cluster.address}

    return Watched(ask)


@contextmanager
def _only_looking(target: str, address: str | None) -> Iterator[None]:
    """Ctrl-C ends what only looks; the run goes on, and whoever pressed it is told so."""
    try:
        yield
    except KeyboardInterrupt:
        how = "" if address is None else f"; {_command('stop', target, address)} would end it"
        typer.echo(f"persona-ray: no longer looking; the run goes on{how}", err=True)
        raise SystemExit(EXIT_INTERRUPTED) from None


def _command(name: str, run: str, address: str) -> str:
    return shlex.join(["persona-ray", name, run, "--address", address])
