"""Results made again from the rows of a store, judged or reduced otherwise, and held against others: no model. Parses, calls, prints."""

from __future__ import annotations

import shlex
from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from persona_ray.cli_store import AsJson, Layers, StoreUrl
from persona_ray.errors import InputError
from persona_ray.terminal import TerminalProgress, show

results_app = typer.Typer(rich_markup_mode=None)

Address = Annotated[str | None, typer.Option(help="Ray cluster: auto, or host:port of its head. Default: a local one.")]


@results_app.command("reduce")
def reduce_command(
    store: StoreUrl,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="reduce.KEY=VALUE", help="Replace a key of the job.")] = None,
    judge: Annotated[str | None, typer.Option(metavar="NAME", help="Whose scores filter rows; none: every row. Default: in force.")] = None,
    layers: Layers = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Moments, role vectors, axis and components of what a store holds now; computed only if rows, scores or settings are new.

    Settings are those of the job that began the store. --set reduce.preset=... starts from that preset instead.

    Example: persona-ray reduce s3://team/qwen3-32b --set reduce.min_count=50
    """
    from persona_ray.reducing import is_reduced, measure_certainty, reduce_store, reduction_of_store, with_gpus
    from persona_ray.report.certainty import sentences
    from persona_ray.report.tables import axis_json, axis_table
    from persona_ray.scheduler.driver import cluster
    from persona_ray.store.finish import finish_store
    from persona_ray.store.reader import open_store

    reader = open_store(store)
    reduction = reduction_of_store(reader, overrides or [], judge_name=judge, layers=parse_layers(layers))
    progress = TerminalProgress(Console(stderr=True, quiet=as_json))
    is_there = is_reduced(reader, reduction)
    with nullcontext() if is_there else cluster(address):
        reduced = reduce_store(reader, reduction if is_there else with_gpus(reduction), progress)
        certainty = measure_certainty(reader, reduction, reduced, progress)
    finish_store(reader.url)
    facts = axis_json(reduced) | {"name": reduced.name, "certainty": None if certainty is None else asdict(certainty)}
    said = [] if certainty is None else ["\n".join(sentences(certainty))]
    show(facts, axis_table(reduced, 5), *said, f"result   {reduced.name}", as_json=as_json)


@results_app.command("judge")
def judge_command(
    store: StoreUrl,
    backend: Annotated[str | None, typer.Option(help="scores or lexicon. Default: that of the job which began the store.")] = None,
    path: Annotated[str | None, typer.Option(help="scores: folder of {archetype}.json; lexicon: a JSON file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a store's rollouts, or score them otherwise: activations are not touched, and what this judge has scored stays.

    Without --path a lexicon is the one that comes with the model, if one does.

    Example: persona-ray judge s3://team/qwen3-32b --backend scores --path my-scores/
    """
    from persona_ray.judge.backends import open_judge
    from persona_ray.judging import judge_store, rows_by_score
    from persona_ray.planning import lexicon_of
    from persona_ray.store.reader import open_store

    reader = open_store(store)
    judge = open_judge(_judge_config(reader.job.get("judge", {}), backend, path), lexicon_of(str(reader.identity["model_id"])))
    if judge is None:
        raise InputError(f"{store}: the job that began this store has no judge; name one with --backend, for example --backend lexicon")
    judge_store(judge, reader, TerminalProgress(Console(stderr=True, quiet=as_json)))
    rows = rows_by_score(reader, judge.name)
    lines = [f"{'not scored' if score < 0 else f'score {score}':<10}  {number:>9,} rows" for score, number in rows.items()]
    following = f"judge    {judge.name}\nnext     persona-ray reduce {shlex.quote(store)}"
    show({"judge": judge.name, "rows": rows}, *lines, following, as_json=as_json)


@results_app.command("compare")
def compare_command(
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="Two or more: folder or URL, with @NAME for another result.")],
    components: Annotated[int, typer.Option(min=1, help="Principal components that span the subspaces compared.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Axes and persona spaces against each other, pair by pair; across models, what archetypes are in each of them.

    Of one model or family: cosines of axes and components, angles between subspaces, by layer. Of any: correlations of the archetypes'
    places along the axis and of their loadings on the components, at each one's recommended layer and by relative depth.

    Example: persona-ray compare s3://team/gemma-2-27b s3://team/gemma-2-27b-base /data/qwen3-32b@0123456789abcdef
    """
    from persona_ray.comparing import compare_results
    from persona_ray.report.compare import comparison_json, comparison_tables

    pairs = compare_results(stores, components)
    show(comparison_json(pairs), comparison_tables(pairs), as_json=as_json)


def _judge_config(settings: Any, backend: str | None, path: str | None) -> Any:
    """The store's own judge, or another one."""
    from persona_ray.config import parse_job

    given = dict(settings) if backend is None else {"backend": backend}
    section = given if path is None else given | {"path": path}
    return parse_job({"model": {"id": "any"}, "store": {"url": "any"}, "judge": section}, where="--backend").judge


def parse_layers(given: str | None) -> tuple[int, ...] | None:
    """`10,20`, rising. Raises InputError for anything but whole numbers."""
    if given is None:
        return None
    try:
        return tuple(sorted({int(layer) for layer in given.split(",")}))
    except ValueError as error:
        raise InputError(f"--layers {given}: expected decoder blocks, separated by commas, such as 10,20") from error
