"""How sure the axis is: in sentences, and as a table of intervals."""

from __future__ import annotations

from html import escape

from persona_ray.report.words import count, decimal, percent
from persona_ray.spec import CertainPosition, Certainty

TITLE = '<h2 id="certainty-title">How sure is it?</h2>'


def section(certainty: Certainty | None) -> str:
    """The card of the page."""
    if certainty is None:
        body = '<p class="read">No error bars were computed (reduce.bootstrap is 0, or there are rows of one question only).</p>'
    else:
        body = f'<p class="read">{escape(" ".join(sentences(certainty)))}</p>{_growth(certainty)}{_intervals(certainty)}'
    return f'<section class="card" id="certainty" aria-labelledby="certainty-title">{TITLE}{body}</section>'


def sentences(certainty: Certainty) -> tuple[str, ...]:
    """What the numbers say."""
    cone = (
        f"With other questions of the same kind, the axis at layer {certainty.layer} would lie within {decimal(certainty.cone_degrees)} "
        f"degrees of this one, with {percent(certainty.confidence)} confidence ({certainty.num_replicates} bootstrap replicates over "
        f"{count(certainty.num_questions, 'question')})."
    )
    halves = "One half of the questions alone has too few rows for an axis."
    if certainty.split_half_cosine is not None:
        halves = f"Axes of two halves of the questions agree to a cosine of {decimal(certainty.split_half_cosine)}."
    if certainty.rows_needed is None:
        enough = "No smaller number of rows that was looked at gives the same axis (cosine 0.99): more rows may still move it."
    else:
        first = f"The first {count(certainty.rows_needed, 'row')} of every archetype"
        enough = f"{first} give the same axis as all of them (cosine at least 0.99)."
    return cone, halves, enough


def _growth(certainty: Certainty) -> str:
    cells = zip(certainty.rows_per_archetype, certainty.cosine_with_all_rows, strict=True)
    lines = "".join(f"<tr><td>{rows:,}</td><td>{'none' if cosine is None else f'{cosine:.4f}'}</td></tr>" for rows, cosine in cells)
    if not lines:
        return ""
    return (
        "<details><summary>How many rows it takes</summary>"
        '<table class="plain"><thead><tr><th>first rows per archetype</th><th>cosine with the axis of all rows</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></details>"
    )


def _intervals(certainty: Certainty) -> str:
    ordered = sorted(certainty.roles.items(), key=lambda item: -item[1].position)
    lines = _line("default Assistant", certainty.default) + "".join(_line(name, place) for name, place in ordered)
    return (
        f"<details><summary>Positions and ranks with {percent(certainty.confidence)} intervals</summary>"
        '<div class="scroll"><table class="plain"><thead><tr><th class="text">archetype</th><th>projection on the axis</th>'
        f"<th>from</th><th>to</th><th>rank among roles</th></tr></thead><tbody>{lines}</tbody></table></div></details>"
    )


def _line(name: str, place: CertainPosition) -> str:
    ranks = (
        ""
        if place.rank_low is None
        else str(place.rank_low)
        if place.rank_low == place.rank_high
        else f"{place.rank_low} to {place.rank_high}"
    )
    numbers = "".join(f"<td>{decimal(value)}</td>" for value in (place.position, place.low, place.high))
    return f'<tr><td class="text">{escape(name)}</td>{numbers}<td>{ranks}</td></tr>'
