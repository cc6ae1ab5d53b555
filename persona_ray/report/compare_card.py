"""The card of the page that holds a store against others. HTML out; every text of the data is escaped. The picture is the script's."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from persona_ray.reduce.space_pair import Space, SpacePair
from persona_ray.report.compare import LAYERS_TITLE, layer_columns, summary
from persona_ray.report.words import names

TITLE = '<h2 id="comparison-title">Against other models and runs</h2>'
READ = (
    "Where each archetype falls on the axis here and there, each at its own recommended layer: 0 is the mean of all characters, "
    "1 the default Assistant. On the dotted line it is equally Assistant-like in both."
)


def section(pairs: Sequence[SpacePair]) -> str:
    """Nothing, if there is nothing to compare with."""
    if not pairs:
        return ""
    body = "".join(_pair(pair, number) for number, pair in enumerate(pairs))
    read = f'<p class="read">{escape(READ)}</p>'
    return f'<section class="card" id="comparison" aria-labelledby="comparison-title">{TITLE}{read}{body}</section>'


def called(space: Space) -> str:
    """The model, as the page calls it."""
    return space.model_id.removeprefix("builtin:")


def _pair(pair: SpacePair, number: int) -> str:
    facts = dict(summary(pair)) | ({"in one of them only": names(pair.left_out)} if pair.left_out else {})
    lines = "".join(f'<tr><td class="text">{escape(what)}</td><td>{escape(value)}</td></tr>' for what, value in facts.items())
    notes = "".join(f"<li>{escape(note)}</li>" for note in pair.notes)
    plot = f'<div class="plot plot-space" id="compare-{number}" role="figure"></div>' if pair.shared else ""
    return (
        f"<h3>{escape(called(pair.b))}</h3><p>{escape(pair.b.label)}</p>{plot}"
        f'<div class="scroll"><table class="plain"><tbody>{lines}</tbody></table></div>'
        f"{f'<ul>{notes}</ul>' if notes else ''}{_layers(pair)}"
    )


def _layers(pair: SpacePair) -> str:
    columns = layer_columns(pair)
    head = "".join(f"<th>{escape(title)}</th>" for title in columns)
    rows = zip(*columns.values(), strict=True)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f"<details><summary>{escape(LAYERS_TITLE)}</summary>"
        f'<div class="scroll"><table class="plain"><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>'
    )
