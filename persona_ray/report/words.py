"""Numbers as people read them, and the sentences that say what was found and what to be careful about.

Plain text; knows nothing of HTML. Nothing is praised: a sentence gives the number and the comparison that it needs.
"""

from __future__ import annotations

import math
from typing import Any

from persona_ray.report.data import LayerView, ReportData, best_place, default_names, layer_view, missing_names, role_indices
from persona_ray.spec import Reduced, SteeringArm, SteeringCheck

NBSP = "\u00a0"
MAX_NAMES = 12


def percent(share: float) -> str:
    """A share (0..1) in percent, without decimals from 10 % on."""
    if not math.isfinite(share):
        return "unknown"
    value = 100 * share
    return f"{value:.0f}{NBSP}%" if abs(value) >= 9.95 or value == 0 else f"{value:.1f}{NBSP}%"


def decimal(value: float | None) -> str:
    """Three significant digits or so, with a true minus sign."""
    if value is None or not math.isfinite(value):
        return "unknown"
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}".replace("-", "\u2212")


def multiple(strength: float) -> str:
    """A signed multiple of a direction, as short as it can be."""
    return f"{strength:g}".replace("-", "\u2212")


def count(number: int, noun: str, plural: str | None = None) -> str:
    """`1,200 rows`, `1 row`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Seconds below two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.1f}{NBSP}s"
    if seconds < 7200:
        return f"{seconds / 60:.1f}{NBSP}min"
    return f"{seconds / 3600:.1f}{NBSP}h"


def names(items: tuple[str, ...]) -> str:
    """A list of names, cut after a dozen."""
    shown = ", ".join(items[:MAX_NAMES])
    return f"{shown} and {len(items) - MAX_NAMES} more" if len(items) > MAX_NAMES else shown


def dim_words(view: LayerView) -> str:
    """What single dims have to do with the axis of a layer. Empty if it is not known."""
    if view.dims is None:
        return ""
    carried = f"About {view.dims.participation:,.0f} dims carry the axis at layer {view.layer}"
    if not view.dims.massive:
        return f"{carried}; none is massive."
    named = names(tuple(f"{dim} ({times:,.0f} x)" for dim, times in view.dims.massive.items()))
    return (
        f"{carried}; massive dims, many times as large as the median dim: {named}. "
        f"They hold {percent(view.dims.share_of_massive)} of its squared length (reduce.pca: masked leaves them out of components)."
    )


def rollout_words(view: LayerView) -> str:
    """What the components of single rollouts say at a layer. Empty if there are none."""
    if view.rollouts is None:
        return ""
    return (
        f"PC1 of all stored rollouts at layer {view.layer} explains {percent(view.rollouts.pc1_ratio)} of their variance; "
        f"its cosine with the axis is {decimal(view.rollouts.cos_pc1_axis)}"
    )


def has_judge(reduced: Reduced) -> bool:
    """Whether scores decided which rows count."""
    return reduced.attributes.get("judge") not in {None, "", "none"}


def model_name(data: ReportData) -> str:
    """The model as the page calls it."""
    return str(data.run.get("model_id") or "an unnamed model").removeprefix("builtin:")


def arm(steering: SteeringCheck, cohort: str, label: str) -> SteeringArm | None:
    """What the edit `label` did to `cohort`, if it was tried."""
    return next((arm for arm in steering.arms if arm.cohort == cohort and arm.label == label), None)


def findings(data: ReportData) -> list[str]:
    """The one or two sentences at the top."""
    reduced = data.reduced
    view = layer_view(reduced, best_place(reduced))
    sentences = [_axis_sentence(reduced, view)]
    if data.steering is not None and (steered := _steering_sentence(data.steering)):
        sentences.append(steered)
    return sentences


def cautions(data: ReportData) -> list[str]:
    """What a reader must know before believing the numbers: what was not done, what is missing."""
    reduced = data.reduced
    found = []
    if not has_judge(reduced):
        found.append("No judge: every stored row counts, whether or not the model stayed in its role.")
    if data.steering is None:
        found.append("No steering check was run: the axis is described here, not shown to act.")
    found += _row_cautions(data.run.get("rows", {}))
    if missing := missing_names(reduced):
        min_count = reduced.attributes.get("min_count", "the required")
        found.append(f"Without a role vector, having fewer than {min_count} usable rows: {names(missing)}.")
    return found


def filter_words(reduced: Reduced) -> str:
    """Which rows a role vector is made of."""
    recorded = reduced.attributes.get("filter")
    return str(recorded) if recorded else "not recorded which rows count"


def _axis_sentence(reduced: Reduced, view: LayerView) -> str:
    return (
        f"At layer {view.layer}, the first principal component explains {percent(view.pc1_ratio)} of the variance "
        f"between {len(role_indices(reduced))} role vectors; its cosine with the Assistant Axis is {decimal(view.cos_pc1_axis)}."
    )


def _steering_sentence(steering: SteeringCheck) -> str | None:
    before, after = arm(steering, "far", "none"), arm(steering, "far", "+axis")
    if before is None or after is None:
        return None
    change = after.assistant_share - before.assistant_share
    verb = "raises" if change > 0 else "lowers" if change < 0 else "does not move"
    return (
        f"Adding {multiple(after.strength)}{NBSP}\u00d7 the axis at layer {steering.layer} {verb} the share of the Assistant's words "
        f"in far-off characters: {percent(before.assistant_share)} before, {percent(after.assistant_share)} after."
    )


def _row_cautions(rows: dict[str, Any]) -> list[str]:
    asked, stored, refused = (int(rows.get(key, 0)) for key in ("asked", "stored", "refused"))
    found = []
    if refused:
        verb = "was" if refused == 1 else "were"
        found.append(f"{count(refused, 'row')} of {asked:,} {verb} refused; the reasons are listed under What was run.")
    if waiting := asked - stored - refused:
        found.append(f"The store is not complete: {count(waiting, 'row')} of {asked:,} {'is' if waiting == 1 else 'are'} still missing.")
    return found


def default_label(reduced: Reduced) -> str:
    """What the default Assistant is called in pictures."""
    return f"{', '.join(default_names(reduced)) or 'default'} (Assistant)"
