"""`persona-ray store`: parses, calls, prints. What a command does lives in `store`, how it looks in `report`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from persona_ray.errors import EXIT_DONE, EXIT_FAILED, InputError
from persona_ray.spec import ProgressCallback
from persona_ray.terminal import TerminalProgress, show

store_app = typer.Typer(rich_markup_mode=None, help="Look into stores, check and mend them.")


class ExportFormat(StrEnum):
    """What `store export` writes."""

    PUBLISHED = "published"
    SAFETENSORS = "safetensors"
    DATASET = "dataset"
    ICECHUNK = "icechunk"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document, nothing else.")]
At = Annotated[str | None, typer.Option(metavar="DIGEST", help="As it was when its ledger had this digest. Default: now.")]
Layers = Annotated[str | None, typer.Option(metavar="L,L,...", help="Decoder blocks, separated by commas.")]
StoreUrl = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of a store.")]


@store_app.command()
def info(
    store: StoreUrl,
    at: At = None,
    cite: Annotated[bool, typer.Option("--cite", help="Keep this state, so that its digest can be cited and opened for ever.")] = False,
    as_json: AsJson = False,
) -> None:
    """What a store holds, how far it is, and what its rows cost.

    Example: persona-ray store info s3://team/qwen3-32b --json
    """
    from persona_ray.report.info import info_table
    from persona_ray.store.reader import open_store

    reader = open_store(store, at)
    if cite:
        reader = open_store(store, reader.cite())
    facts = reader.info()
    show(facts, info_table(facts), as_json=as_json)


@store_app.command("verify")
def verify_store(
    store: StoreUrl,
    sample: Annotated[float | None, typer.Option(help="Share of the units, above 0 and up to 1. Default: all of them.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Units read at the same time; each takes memory.")] = 4,
    requeue: Annotated[bool, typer.Option("--requeue", help="Remove what is wrong, so that the next run makes it again.")] = False,
    as_json: AsJson = False,
) -> None:
    """Is everything right that a store holds? Reads all of it, and names what is not. Exit code 1: something is wrong.

    With --requeue (while no run is at work): what is wrong is taken out, what follows from the plan is written anew.

    Example: persona-ray store verify s3://team/qwen3-32b --sample 0.01
    """
    from persona_ray.report.verify import requeued_json, requeued_lines, verification_json, verification_table
    from persona_ray.store import repair
    from persona_ray.store.verify import verify

    with TerminalProgress(Console(stderr=True, quiet=as_json)).phase("verify", 0, "units") as advance:
        found = verify(store, sample=sample, workers=workers, progress=advance)
    if not requeue:
        show(verification_json(found), verification_table(found), as_json=as_json)
        raise typer.Exit(EXIT_DONE if found.is_right else EXIT_FAILED)
    restored = repair.restore(store) if found.flaws else ()
    done = repair.requeue(store, found.wrong_units)
    facts = verification_json(found) | requeued_json(done, restored)
    show(facts, verification_table(found), requeued_lines(done, restored), as_json=as_json)
    if any(flaw.key not in restored for flaw in found.flaws):
        raise typer.Exit(EXIT_FAILED)


@store_app.command("ls")
def list_command(
    place: Annotated[str, typer.Argument(metavar="URL", help="Folder, or bucket with a prefix.")],
    depth: Annotated[int, typer.Option(min=0, help="Levels of folders to open.")] = 8,
    as_json: AsJson = False,
) -> None:
    """All stores below a folder or a bucket's prefix, a line each.

    Example: persona-ray store ls s3://team
    """
    from persona_ray.report.stores import listing_json, listing_table
    from persona_ray.store.listing import list_stores

    found = list_stores(place, max_depth=depth)
    show(listing_json(place, found), listing_table(found), as_json=as_json)


@store_app.command("diff")
def diff_command(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder or URL of a store.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Folder or URL of another.")],
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative difference of a row that counts as equal. Default: every bit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Are two stores equal as sets of rows, whatever their units and order? Exit code 1: they are not.

    Example: persona-ray store diff s3://team/qwen3-32b /data/qwen3-32b --tolerance 0.01
    """
    from persona_ray.report.stores import difference_json, difference_table
    from persona_ray.store.diff import diff_stores
    from persona_ray.store.reader import open_store

    one, other = open_store(a), open_store(b)
    with _phase("diff", len(one.units()), as_json=as_json) as advance:
        found = diff_stores(one, other, tolerance=tolerance, progress=advance)
    show(difference_json(found), difference_table(found), as_json=as_json)
    if not found.is_equal:
        raise typer.Exit(EXIT_FAILED)


@store_app.command("copy")
def copy_command(
    store: StoreUrl,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="New or empty place, or an earlier copy.")],
    layers: Layers = None,
    archetypes: Annotated[str | None, typer.Option(help="Only these, separated by commas. Default: all.")] = None,
    at: At = None,
    workers: Annotated[int, typer.Option(min=1, help="Units under way at once; each takes memory.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Copy a store byte by byte, or some layers or archetypes as a store of their own; again: what is missing.

    Everything is compared with its digest on the way. Exit code 1: something in the source is damaged, and was not copied.

    Example: persona-ray store copy s3://team/qwen3-32b /data/part --layers 12,18 --archetypes default,pirate
    """
    from persona_ray.report.stores import copied_json, copied_lines
    from persona_ray.store.copy import copy_store
    from persona_ray.store.reader import open_store

    names = None if archetypes is None else [name.strip() for name in archetypes.split(",")]
    with _phase("copy", len(open_store(store, at).units()), as_json=as_json) as advance:
        found = copy_store(store, target, layers=_numbers(layers), archetypes=names, at=at, workers=workers, progress=advance)
    show(copied_json(found), copied_lines(found), as_json=as_json)
    if not found.is_right:
        raise typer.Exit(EXIT_FAILED)


@store_app.command("export")
def export_command(
    store: StoreUrl,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="New or empty.")],
    layout: Annotated[ExportFormat, typer.Option("--format", help="What to write.")],
    layers: Layers = None,
    at: At = None,
    as_json: AsJson = False,
) -> None:
    """Write committed rows, or the axis, for other tools.

    published: the layout of the paper's code (responses, activations and vectors as .pt). safetensors: axis, vectors and components
    with a model card. dataset: a Hugging Face dataset folder, rows = rollouts; --layers adds activations. icechunk: a repository.

    Example: persona-ray store export s3://team/qwen3-32b /data/hub --format safetensors
    """
    from persona_ray.store.exchange.command import export_store
    from persona_ray.store.reader import open_store

    reader = open_store(store, at)
    with _phase("export", len(reader.units()), as_json=as_json) as advance:
        done = export_store(reader, out, layout.value, _numbers(layers), progress=advance)
    _show_exchange(asdict(done), as_json=as_json)


@store_app.command("import")
def import_command(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="responses/*.jsonl and activations/*.pt, as the paper's code writes them.")
    ],
    store: StoreUrl,
    model: Annotated[str, typer.Option(help="The model that they were made with: hub name.")],
    revision: Annotated[str | None, typer.Option(help="Of the model, if it is known.")] = None,
    layers: Layers = None,
    as_json: AsJson = False,
) -> None:
    """Make a store of activations in the published layout, without any model. Scores come along where there are any.

    --layers says which decoder blocks the tensors hold; without it they are counted from 0.

    Example: persona-ray store import /data/published /data/store --model Qwen/Qwen3-32B
    """
    from persona_ray.store.exchange.published_import import import_published

    with _phase("import", 0, as_json=as_json) as advance:
        done = import_published(folder, store, model_id=model, model_revision=revision, layers=_numbers(layers), progress=advance)
    _show_exchange(asdict(done), as_json=as_json)


@store_app.command("gc")
def collect_leftovers(
    store: StoreUrl,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Default: only list them.")] = False,
    texts: Annotated[bool, typer.Option("--texts", help="Also text of units that never committed, from which a run could go on.")] = False,
    older_than: Annotated[float, typer.Option(min=0, metavar="HOURS", help="Only what is older.")] = 24,
    as_json: AsJson = False,
) -> None:
    """List leftovers: numbers of units that never committed, old quarantine, half-made files. Nothing that a marker names.

    Numbers are left alone while anything was written within --older-than: a run may be at work.

    Example: persona-ray store gc s3://team/qwen3-32b --yes
    """
    from persona_ray.report.verify import collection_json, collection_table
    from persona_ray.store.repair import gc

    found = gc(store, delete=yes, texts=texts, min_age_s=older_than * 3600)
    show(collection_json(found), collection_table(found), as_json=as_json)


def _phase(name: str, total: int, *, as_json: bool) -> AbstractContextManager[ProgressCallback]:
    """Progress over units, on the terminal's other stream."""
    return TerminalProgress(Console(stderr=True, quiet=as_json)).phase(name, total, "units")


def _numbers(text: str | None) -> list[int] | None:
    """`12,18`. Raises InputError."""
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--layers {text}: give whole numbers separated by commas, such as 12,18") from error


def _show_exchange(facts: dict[str, Any], *, as_json: bool) -> None:
    """Where it is, how many rows, and what was left out, with the reasons."""
    left_out = [f"left out {number:,} rows: {reason}" for reason, number in facts["left_out"].items()]
    show(facts, f"{facts.get('folder') or facts['url']}: {facts['rows']:,} rows", *left_out, as_json=as_json)
