"""The parts of the page that need no script: header, steering check, what was run, footer.

HTML in, HTML out: every text that comes from data goes through `_e`, which escapes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from persona_ray.report.data import LayerView, ReportData, best_place, layer_view, role_indices
from persona_ray.report.words import (
    arm,
    cautions,
    count,
    decimal,
    dim_words,
    duration,
    filter_words,
    findings,
    model_name,
    multiple,
    names,
    percent,
    rollout_words,
)
from persona_ray.spec import SteeringArm, SteeringCheck, SteeringExample

ARM_ORDER = ("+axis", "+random", "none", "-random", "-axis")
ARM_CLASS = {"+axis": "axis-up", "-axis": "axis-down", "none": "unedited"}
COHORT_WORDS = {"far": "Characters at the role-playing end", "near": "The Assistant and its neighbours"}
CANDIDATE_WORDS = {
    "shift_toward": "far-off characters move toward the Assistant by",
    "shift_away": "the Assistant moves away by",
    "words_kept": "telling words kept",
}
WHOLE_COLUMNS = ("layer", "strength")
OPEN_EXAMPLES = 3
RUN_WORDS = {
    "model_id": "Model",
    "model_revision": "Revision",
    "dtype": "Numbers",
    "attention": "Attention",
    "stages": "Stages",
    "judge": "Judge",
    "preset": "Preset",
    "units": "Units",
    "tokens": "Tokens",
    "hardware": "Hardware",
    "date": "Date",
    "store_url": "Store",
    "identity_digest": "Identity digest",
    "ledger_digest": "Ledger digest",
}


def header(data: ReportData) -> str:
    """Title, the sentence that says what was found, cautions, and the leading numbers."""
    view = layer_view(data.reduced, best_place(data.reduced))
    title, date = str(data.run.get("title") or "persona_ray"), str(data.run.get("date") or "")
    eyebrow = " \u00b7 ".join(filter(None, [title, date.partition("T")[0]]))
    warned = "".join(f"<li>{_e(text)}</li>" for text in cautions(data))
    figures = "".join(f"<div><dt>{_e(text)}</dt><dd>{_e(value)}</dd></div>" for value, text in _figures(data, view))
    return "\n".join(
        [
            f'<p class="eyebrow">{_e(eyebrow)}</p>',
            f"<h1>The Assistant Axis of <span>{_e(model_name(data))}</span></h1>",
            f'<p class="lead">{_e(" ".join(findings(data)))}</p>',
            f'<ul class="cautions" aria-label="Cautions">{warned}</ul>' if warned else "",
            f'<dl class="figures">{figures}</dl>',
        ]
    )


def steering(check: SteeringCheck | None) -> str:
    """Shares of the Assistant's words under every edit, with example answers; or the word that nobody looked."""
    title = '<h2 id="steering-title">Does the axis act?</h2>'
    if check is None:
        body = '<p class="read">No steering check was run, so this report says nothing about what the axis does when it is added.</p>'
    else:
        body = _steering_body(check)
    return f'<section class="card" id="steering" aria-labelledby="steering-title">{title}{body}</section>'


def run(data: ReportData) -> str:
    """The box with what was run."""
    facts = data.run
    own_words = {"title", "rows", "seconds", "versions"}
    known = {key: data.reduced.attributes[key] for key in ("judge", "preset") if key in data.reduced.attributes} | dict(facts)
    view = layer_view(data.reduced, best_place(data.reduced))
    settings = {
        "Reduction": data.reduced.name,
        "Rows that count": filter_words(data.reduced),
        **({"Single dims": dim_words(view)} if view.dims is not None else {}),
        **({"Single rollouts": rollout_words(view)} if view.rollouts is not None else {}),
    }
    general = {label: known[key] for key, label in RUN_WORDS.items() if key in known} | settings
    further = {key: value for key, value in facts.items() if key not in RUN_WORDS and key not in own_words}
    counts = (
        _titled("Rows", _rows(facts.get("rows", {}))),
        _titled("Time", _times(facts.get("seconds", {}))),
        _titled("Versions", _definitions(facts.get("versions", {}))),
    )
    return (
        '<section class="card" id="run" aria-labelledby="run-title"><h2 id="run-title">What was run</h2>'
        f'<div class="run"><div>{_definitions(general | further)}</div><div>{"".join(counts)}</div></div></section>'
    )


def footer(data: ReportData) -> str:
    """The formula, and how to open the numbers."""
    url = str(data.run.get("store_url") or "STORE")
    group = f"reduced/{data.reduced.name}"
    is_native = str(data.run.get("dtype", "")).endswith("bfloat16 store")
    needed = ["import persona_ray.store.bfloat16    # Zarr does not know this type by itself"] if is_native else []
    code = "\n".join(
        [
            "import xarray",
            *needed,
            "",
            f"rows = xarray.open_zarr({json.dumps(url)})    # rows.activations: rollout x layer x hidden",
            f"found = xarray.open_zarr({json.dumps(url)}, group={json.dumps(group)})",
            "found.axis, found.role_vector    # layer x hidden; archetype x layer x hidden",
        ]
    )
    return (
        '<p class="formula">axis = default \u2212 mean of roles</p>'
        "<p>Per layer: the mean activation of the default Assistant's answers, minus the unweighted mean of the role vectors. "
        "A layer is the output of one decoder block, counted from 0; an activation is its mean over the tokens of one answer. "
        "Method: Lu et al., <cite>The Assistant Axis</cite>, arXiv 2601.10387.</p>"
        f"<p>The numbers behind this page:</p><pre><code>{_e(code)}</code></pre>"
    )


def _figures(data: ReportData, view: LayerView) -> list[tuple[str, str]]:
    rows = data.run.get("rows", {})
    found = [
        (decimal(view.cos_pc1_axis), f"cosine of PC1 and the axis, layer {view.layer}"),
        (percent(view.pc1_ratio), f"of the variance in PC1, layer {view.layer}"),
    ]
    if data.steering is not None:
        before, after = arm(data.steering, "far", "none"), arm(data.steering, "far", "+axis")
        if before is not None and after is not None:
            shift = f"{percent(before.assistant_share)} \u2192 {percent(after.assistant_share)}"
            found.append((shift, f"the Assistant's words in far-off characters, axis \u00d7 {multiple(after.strength)} added"))
    found.append((f"{len(role_indices(data.reduced)):,}", f"role vectors of {count(len(data.reduced.archetypes), 'archetype')}"))
    if "stored" in rows:
        found.append((f"{rows['stored']:,}", "rollouts stored"))
    return found


def _steering_body(check: SteeringCheck) -> str:
    cohorts = "".join(_cohort(check, cohort, members) for cohort, members in check.cohorts.items())
    examples = [_example(example) for example in check.examples]
    further = "".join(examples[OPEN_EXAMPLES:])
    read = (
        f"A multiple of the axis was added to the output of layer {check.layer} while the model answered. "
        "Bars show how many of the telling words in the answers are the Assistant's. A random direction of the same length is the control: "
        "where it moves as much as the axis, the axis says nothing. Layer and strength were chosen on "
        f"{count(len(check.questions_chosen_on), 'question')}, and measured on {len(check.questions_measured_on)} others."
    )
    return "".join(
        [
            f'<p class="read">{_e(read)}</p>',
            f'<div class="cohorts">{cohorts}</div>',
            "<h3>In the model's own words</h3>" if examples else "",
            *examples[:OPEN_EXAMPLES],
            f"<details><summary>{count(len(examples) - OPEN_EXAMPLES, 'more example')}</summary>{further}</details>" if further else "",
            _candidates(check),
        ]
    )


def _cohort(check: SteeringCheck, cohort: str, members: tuple[str, ...]) -> str:
    arms = sorted((arm for arm in check.arms if arm.cohort == cohort), key=lambda arm: _place(arm.label))
    return (
        f"<div><h3>{_e(COHORT_WORDS.get(cohort, cohort))}</h3><p>{_e(names(members))}</p>"
        f'<table class="arms"><tbody>{"".join(_arm_row(arm) for arm in arms)}</tbody></table></div>'
    )


def _arm_row(arm: SteeringArm) -> str:
    width = min(max(100 * arm.assistant_share, 0.0), 100.0)
    kind, words = ARM_CLASS.get(arm.label, "control"), _edit_words(arm.label, arm.strength)
    return (
        f'<tr class="{kind}" title="{_e(count(arm.num_answers, "answer"))}"><th scope="row">{_e(words)}</th>'
        f'<td class="bar"><i style="width:{width:.2f}%"></i></td><td class="share">{percent(arm.assistant_share)}</td></tr>'
    )


def _example(example: SteeringExample) -> str:
    labels = sorted(example.answers, key=lambda label: (label != "none", _place(label)))
    controls = [label for label in labels if label.endswith("random")]
    shown = [label for label in labels if label not in controls]
    control = f"<details><summary>The same with a random direction</summary>{_quotes(example, controls)}</details>" if controls else ""
    return (
        f'<div class="example"><p><span class="who">{_e(example.archetype)}</span>, asked: {_e(example.question)}</p>'
        f"{_quotes(example, shown)}{control}</div>"
    )


def _quotes(example: SteeringExample, labels: Sequence[str]) -> str:
    return f'<div class="answers">{"".join(_quote(label, example.answers[label]) for label in labels)}</div>'


def _quote(label: str, answer: str) -> str:
    kind = ARM_CLASS.get(label, "control")
    return f'<blockquote class="{kind}"><span class="edit">{_e(_edit_words(label))}</span>{_e(answer)}</blockquote>'


def _candidates(check: SteeringCheck) -> str:
    """The table from which layer and strength were chosen."""
    if not check.candidates:
        return ""
    columns = list(check.candidates[0])
    headers = "".join(f"<th>{_e(CANDIDATE_WORDS.get(column, column))}</th>" for column in columns)
    lines = "".join(_candidate_row(row, columns, check) for row in check.candidates)
    return (
        f"<details><summary>How layer {check.layer} and strength {multiple(check.strength)} were chosen</summary>"
        f'<div class="scroll"><table class="plain"><thead><tr>{headers}</tr></thead><tbody>{lines}</tbody></table></div></details>'
    )


def _candidate_row(row: Mapping[str, float], columns: Sequence[str], check: SteeringCheck) -> str:
    chosen = (row["layer"], row["strength"]) == (check.layer, check.strength)
    cells = "".join(f"<td>{_e(multiple(row[column]) if column in WHOLE_COLUMNS else decimal(row[column]))}</td>" for column in columns)
    return f"<tr{' class=chosen' if chosen else ''}>{cells}</tr>"


def _edit_words(label: str, strength: float | None = None) -> str:
    """`+axis` as "axis added", or with its strength as "axis × 2"."""
    if label not in ARM_ORDER:
        return label
    if label == "none":
        return "no edit"
    direction = {"axis": "axis", "random": "random direction"}[label[1:]]
    if strength is None:
        return f"{direction} {'added' if label.startswith('+') else 'subtracted'}"
    return f"{direction} \u00d7 {multiple(strength)}"


def _place(label: str) -> int:
    return ARM_ORDER.index(label) if label in ARM_ORDER else len(ARM_ORDER)


def _rows(rows: Mapping[str, Any]) -> str:
    counts = {word.capitalize(): f"{rows[word]:,}" for word in ("asked", "stored", "refused") if word in rows}
    reasons = rows.get("reasons", {}).items()
    lines = "".join(f'<tr><td>{number:,}</td><td class="text">{_e(reason)}</td></tr>' for reason, number in reasons)
    head = '<thead><tr><th>rows</th><th class="text">refused because</th></tr></thead>'
    return _definitions(counts) + (f'<table class="plain">{head}<tbody>{lines}</tbody></table>' if lines else "")


def _times(seconds: Mapping[str, float]) -> str:
    times = {phase: duration(value) for phase, value in seconds.items()}
    return _definitions(times | {"together": duration(sum(seconds.values()))}) if times else ""


def _titled(title: str, body: str) -> str:
    return f"<h3>{_e(title)}</h3>{body}" if body else ""


def _definitions(facts: Mapping[str, Any]) -> str:
    if not facts:
        return ""
    return f"<dl>{''.join(f'<dt>{_e(term)}</dt><dd>{_e(_plain(value))}</dd>' for term, value in facts.items())}</dl>"


def _plain(value: object) -> str:
    """Numbers with thousands, lists and mappings in words, all else as it is."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case Mapping():
            return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
        case list() | tuple():
            return ", ".join(_plain(item) for item in value)
        case _:
            return str(value)


def _e(text: object) -> str:
    return escape(str(text), quote=True)
