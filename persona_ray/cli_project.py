"""`persona-ray project`: rows, or conversations, on an axis. Parses, calls, prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from persona_ray.cli_results import Address, parse_layers
from persona_ray.cli_store import AsJson, Layers
from persona_ray.errors import InputError
from persona_ray.terminal import TerminalProgress, show

if TYPE_CHECKING:
    from persona_ray.reduce.projection import Target

project_app = typer.Typer(rich_markup_mode=None)


@project_app.command("project")
def project_command(
    store: Annotated[str | None, typer.Argument(metavar="[STORE]", help="Folder or URL of the store whose rows are projected.")] = None,
    axis: Annotated[
        str | None, typer.Option(metavar="REF", help="STORE, STORE@NAME, or a .safetensors or .pt file. Default: the store's own.")
    ] = None,
    component: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="Its principal component K instead of the axis; 1 is PC1.")
    ] = None,
    layers: Layers = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="A line for each row and layer: .parquet or .csv.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Archetypes shown at each end.")] = 10,
    conversations: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Instead of STORE: .jsonl file, or folder of them, in the published layout.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="That reads them: hub name, folder or URL.")] = None,
    keep: Annotated[
        str | None, typer.Option("--store", metavar="URL", help="Keep their activations there; again: what is missing.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Run the model on CPU.")] = False,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key of their job.")] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Where rows lie on an axis, from whatever store or file it comes: mean and spread by archetype, single rows with --out.

    Projections are in units of the residual stream; position: 0 = mean role, 1 = default Assistant. At the layer that the axis
    recommends, unless --layers says otherwise. All stored rows count, whatever their score. With --conversations a model reads them,
    and every turn of the Assistant is a row.

    Example: persona-ray project --conversations chats/ --model Qwen/Qwen3-32B --axis s3://team/qwen3-32b --out drift.parquet
    """
    from persona_ray.projecting import open_target
    from persona_ray.store.exchange.table_file import check_table_file

    reference = _reference(
        store, axis, conversations, {"--model": model, "--store": keep, "--cpu": cpu, "--set": overrides, "--address": address}
    )
    if out is not None:
        check_table_file(out)
    target, wanted = open_target(reference, component), parse_layers(layers)
    projecting = _Projecting(target, wanted, out, top, as_json=as_json)
    if conversations is None:
        projecting.rows_of(str(store))
    else:
        projecting.read(conversations, str(model), keep, on_cpu=cpu, overrides=overrides or [], address=address)


@dataclass(frozen=True, slots=True)
class _Projecting:
    """What both ways of the command have in common."""

    target: Target
    layers: tuple[int, ...] | None
    out: Path | None
    top: int
    as_json: bool

    @property
    def progress(self) -> TerminalProgress:
        """On the terminal's other stream."""
        return TerminalProgress(Console(stderr=True, quiet=self.as_json))

    def rows_of(self, url: str, more: Mapping[str, Any] = MappingProxyType({}), *lines: str) -> None:
        """Project the store's rows and print them; `more` facts, and `lines` for people."""
        from persona_ray.projecting import project_store
        from persona_ray.report.projection import projection_json, projection_tables
        from persona_ray.store.reader import open_store

        with self.progress.phase("project", 0, "rows") as advance:
            found = project_store(open_store(url), self.target, self.layers, out=self.out, advance=advance)
        said = [*lines, *([] if self.out is None else [f"rows     {self.out}"])]
        facts = projection_json(found) | {"out": None if self.out is None else str(self.out), **more}
        show(facts, projection_tables(found, self.top), *said, as_json=self.as_json)

    def read(
        self, conversations: Path, model: str, keep: str | None, *, on_cpu: bool, overrides: Sequence[str], address: str | None
    ) -> None:
        """Let the model read them into a store, that of --store or a passing one, and project its rows."""
        from persona_ray.planning import prepare
        from persona_ray.projecting import chosen_layers, conversations_job, require_width

        try:
            from persona_ray.pipeline import extract_only
        except ModuleNotFoundError as error:
            raise InputError(
                f"{error.name} is not installed; running a model needs the engine: pip install 'persona-ray[engine]'"
            ) from error
        layers = chosen_layers(self.target, self.layers)
        with nullcontext(keep) if keep is not None else _passing_store() as url:
            setup = prepare(conversations_job(conversations, model, layers, url, on_cpu=on_cpu, overrides=overrides))
            require_width(self.target, setup.identity.hidden_size, model)
            counts = extract_only(setup, self.progress, address=address)
            refused = [f"refused  {number:,} turns: {reason}" for reason, number in counts.reasons.items()]
            self.rows_of(url, {"store": keep, "turns": asdict(counts)}, *refused, *([] if keep is None else [f"store    {keep}"]))


def _reference(store: str | None, axis: str | None, conversations: Path | None, options: Mapping[str, Any]) -> str:
    """Where the axis comes from. Raises InputError for options that do not belong together."""
    if conversations is None:
        strays = [name for name, value in options.items() if value]
        if store is None or strays:
            raise InputError(f"{strays[0]} belongs to --conversations" if strays else "expected a STORE, or --conversations with --model")
        return axis or store
    if store is not None:
        raise InputError(f"{store}: expected a STORE or --conversations, not both; --store names where their activations are kept")
    if axis is None or options["--model"] is None:
        raise InputError("--conversations needs --model, which reads them, and --axis, on which they are projected")
    if options["--address"] is not None and options["--store"] is None:
        raise InputError("--address needs --store: a folder or bucket that the cluster can write to")
    return axis


@contextmanager
def _passing_store() -> Iterator[str]:
    """A store that goes away."""
    with TemporaryDirectory(prefix="persona-ray-") as folder:
        yield str(Path(folder) / "store")
