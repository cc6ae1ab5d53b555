"""One self-contained HTML file that needs no network, and cannot use one.

The page carries Plotly, its own script and style, and the numbers it draws (rounded to five digits; no activations). A content
security policy forbids every load and every script but these two, by their digests; so a text from the data cannot run either.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from persona_ray.reduce.space_pair import SpacePair
from persona_ray.report import certainty, compare_card, sections
from persona_ray.report.data import LayerView, ReportData, best_place, default_names, layer_views, role_indices
from persona_ray.report.words import default_label, model_name

MAX_COMPONENTS = 20
SIGNIFICANT_DIGITS = 5


def render_page(data: ReportData) -> str:
    """The report as one HTML document. Raises IntegrityError if no archetype has a role vector or no best layer is recorded."""
    script, plotly = _asset("page.js"), get_plotlyjs()
    return Template(_asset("page.html")).substitute(
        policy=_policy(plotly, script),
        title=escape(f"The Assistant Axis of {model_name(data)}"),
        style=_asset("page.css"),
        header=sections.header(data),
        steering=sections.steering(data.steering),
        certainty=certainty.section(data.certainty),
        comparison=compare_card.section(data.comparisons),
        run=sections.run(data),
        footer=sections.footer(data),
        best_reason=escape(str(data.reduced.attributes.get("best_layer_reason") or "as recorded in the store")),
        payload=inert_json(payload(data)),
        plotly=plotly,
        script=script,
    )


def payload(data: ReportData) -> dict[str, Any]:
    """What the script draws; plain JSON values. Lists about roles share one order."""
    reduced = data.reduced
    codes = role_indices(reduced)
    return {
        "names": [reduced.archetypes[code] for code in codes],
        "rows": [int(reduced.role_count_A[code]) for code in codes],
        "defaultName": ", ".join(default_names(reduced)) or "default",
        "defaultLabel": default_label(reduced),
        "best": best_place(reduced),
        "layers": [_drawn(view) for view in layer_views(reduced)],
        "comparisons": [_compared(pair) for pair in data.comparisons],
    }


def inert_json(value: object) -> str:
    """JSON that may stand inside a script element: no `<`, `>` or `&`, hence neither an end tag nor a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _drawn(view: LayerView) -> dict[str, Any]:
    x, y, z = (_rounded(column) for column in view.roles_A3.T)
    return {
        "layer": view.layer,
        "x": x,
        "y": y,
        "z": z,
        "position": _rounded(view.position_A),
        "default": _rounded(view.default_3),
        "cos": _rounded_one(view.cos_pc1_axis),
        "norm": _rounded_one(view.axis_norm),
        "separation": _rounded_one(view.separation),
        "ratio": _rounded(view.explained_ratio_K[:MAX_COMPONENTS]),
        "inPlane": _rounded_one(view.share_in_plane),
    }


def _compared(pair: SpacePair) -> dict[str, Any]:
    """Places along either axis, each at its own recommended layer."""
    at_a, at_b = [pair.a.archetypes.index(name) for name in pair.shared], [pair.b.archetypes.index(name) for name in pair.shared]
    return {
        "names": list(pair.shared),
        "x": _rounded(pair.a.position_AL[at_a, pair.a.best_place]),
        "y": _rounded(pair.b.position_AL[at_b, pair.b.best_place]),
        "xTitle": f"{compare_card.called(pair.a)}, layer {pair.a.best_layer}",
        "yTitle": f"{compare_card.called(pair.b)}, layer {pair.b.best_layer}",
    }


def _rounded(values: Iterable[float]) -> list[float | None]:
    return [_rounded_one(float(value)) for value in values]


def _rounded_one(value: float | None) -> float | None:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if value is not None and math.isfinite(value) else None


def _policy(*scripts: str) -> str:
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"


def _asset(name: str) -> str:
    return files("persona_ray.report").joinpath(name).read_text(encoding="utf-8")
