"""A store as the published implementation would have written it.

One pass over the store: a unit holds rows of all archetypes and a published file all rows of one, so each archetype's numbers
are first appended to a raw file beside the export, and then mapped into its `.pt`. Memory: a few units, and the text of one archetype;
disk: the export and one archetype. Activations are bfloat16 where the store is bf16-exact (as published), float32 where it is
not; vectors and axis are float32, which the published loaders read as well, because rounding an axis costs accuracy for nothing.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from persona_ray.errors import InputError
from persona_ray.spec import NOT_SCORED, ProgressCallback, Reduced
from persona_ray.store.exchange.published_layout import DEFAULT_ROLE, NOTE_FILE, as_line, row_key
from persona_ray.store.exchange.result import result_in_force, role_vectors
from persona_ray.store.exchange.target import Exported, files_in, new_folder
from persona_ray.store.exchange.torch_files import require_torch, save
from persona_ray.store.exchange.view import StoredRows, View, view_of
from persona_ray.store.reader import StoreReader

PUBLISHED_SCORE = 3
"""The score of the published role vectors."""


def export_published(
    store: StoreReader, folder: str | Path, *, layers: Sequence[int] | None = None, progress: ProgressCallback = lambda _: None
) -> Exported:
    """The committed rows, and the result in force, in the published layout; `progress` is told of units.

    Raises InputError if the layout cannot hold the store (several samples or turns, no or several default Assistants), for a
    layer that was not captured, and if `folder` is not new or empty.
    """
    require_torch()
    view = view_of(store, layers)
    names = _role_names(store)
    _check_keys(view)
    reduced = result_in_force(store, view.layers)
    with new_folder(folder) as draft:
        roles = {name: _Role(draft, name, is_bf16=store.identity["store_dtype"] != "float32") for name in names.values()}
        for unit in view.rows(progress):
            _spill(unit, {archetype: roles[name] for archetype, name in names.items()})
        written = [role for role in roles.values() if role.places]
        for role in written:
            role.write()
        if reduced is not None:
            _write_vectors(draft, reduced, names)
        rows = sum(len(role.places) for role in written)
        (draft / NOTE_FILE).write_text(json.dumps(_note(view, rows, reduced), indent=2) + "\n", encoding="utf-8")
        files = files_in(draft)
    return Exported(folder=str(folder), files=files, rows=rows, left_out=dict(view.left_out), ledger_digest=view.ledger_digest)


@dataclass(slots=True)
class _Role:
    """One archetype's files in the making."""

    folder: Path
    name: str
    is_bf16: bool
    places: dict[tuple[int, int], int] = field(default_factory=dict)
    """(system prompt, question) -> place in the raw files."""
    scores: dict[tuple[int, int], int] = field(default_factory=dict)
    row_shape: tuple[int, ...] = ()

    def append(self, unit: StoredRows, picked: Sequence[int]) -> None:
        """The unit's rows at `picked`."""
        values_RLD = unit.activations_RLD[list(picked)]
        self.row_shape = values_RLD.shape[1:]
        with self._raw("numbers").open("ab") as numbers:
            numbers.write((values_RLD.astype(ml_dtypes.bfloat16) if self.is_bf16 else values_RLD).tobytes())
        with self._raw("text").open("a", encoding="utf-8") as text:
            for i in picked:
                rollout = unit.rollouts[i]
                place = (rollout.key.system_prompt, rollout.key.question)
                self.places[place] = len(self.places)
                if unit.score_R[i] != NOT_SCORED:
                    self.scores[place] = int(unit.score_R[i])
                text.write(json.dumps(as_line(rollout), ensure_ascii=False) + "\n")

    def write(self) -> None:
        """The published files, rows by system prompt and question; the raw ones go."""
        order = sorted(self.places)
        lines = self._raw("text").read_text(encoding="utf-8").split("\n")
        responses = _made(self.folder / "responses") / f"{self.name}.jsonl"
        responses.write_text("".join(f"{lines[self.places[place]]}\n" for place in order), encoding="utf-8", newline="\n")
        numbers = np.memmap(
            self._raw("numbers"), dtype=np.uint16 if self.is_bf16 else np.float32, mode="c", shape=(len(order), *self.row_shape)
        )
        save(self.folder / "activations" / f"{self.name}.pt", {row_key(*place): _row(numbers, self.places[place]) for place in order})
        if self.scores:
            scores = {row_key(*place): self.scores[place] for place in order if place in self.scores}
            (_made(self.folder / "scores") / f"{self.name}.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
        self._raw("numbers").unlink()
        self._raw("text").unlink()

    def _raw(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}.raw"


def _row(numbers: npt.NDArray[Any], place: int) -> npt.NDArray[Any]:
    """A plain array over the mapped pages: each row is a tensor with its own storage, as published."""
    return np.asarray(numbers[place])


def _spill(unit: StoredRows, roles: Mapping[str, _Role]) -> None:
    picked: defaultdict[str, list[int]] = defaultdict(list)
    for i, rollout in enumerate(unit.rollouts):
        picked[rollout.key.archetype].append(i)
    for archetype, places in picked.items():
        roles[archetype].append(unit, places)


def _role_names(store: StoreReader) -> dict[str, str]:
    """Archetype -> its name there. The default Assistant is found by its file's name alone, so it gets that name."""
    defaults = store.default_archetypes
    if len(defaults) > 1:
        raise InputError(f"{store.url}: the published layout knows one default Assistant, and this store has {', '.join(defaults)}")
    if DEFAULT_ROLE in store.archetypes and DEFAULT_ROLE not in defaults:
        raise InputError(f"{store.url}: {DEFAULT_ROLE!r} is a role here, and the published layout takes it for the default Assistant")
    unsafe = next((name for name in store.archetypes if "/" in name or "\0" in name or name.startswith(".")), None)
    if unsafe is not None:
        raise InputError(f"{store.url}: archetype {unsafe!r} cannot be the name of a file")
    return {name: DEFAULT_ROLE if name in defaults else name for name in store.archetypes}


def _check_keys(view: View) -> None:
    """Known from the plan, before anything is read."""
    columns = view.store.rows(view.layers).columns
    places = Counter(zip(*(columns[name].tolist() for name in ("archetype", "system_prompt", "question")), strict=True))
    (code, system_prompt, question), most = places.most_common(1)[0]
    if most > 1:
        raise InputError(
            f"{view.store.url}: {most} rows of {view.store.archetypes[code]} have system prompt {system_prompt} and question {question}; "
            f"the published layout calls all of them {row_key(system_prompt, question)} and cannot tell samples or turns apart"
        )


def _write_vectors(folder: Path, reduced: Reduced, names: Mapping[str, str]) -> None:
    """Twice: as the pipeline leaves them, and as they were released."""
    roles = role_vectors(reduced)
    kind = _kind(reduced.attributes.get("min_score"))
    save(folder / "vectors" / f"{DEFAULT_ROLE}.pt", {"vector": reduced.default_vector_LD, "type": "mean", "role": DEFAULT_ROLE})
    save(folder / "default_vector.pt", reduced.default_vector_LD)
    for archetype, vector_LD in roles.items():
        name = names[archetype]
        save(folder / "vectors" / f"{name}.pt", {"vector": vector_LD, "type": kind, "role": name})
        save(folder / "role_vectors" / f"{name}.pt", vector_LD)
    role_mean_LD = np.mean(list(roles.values()), axis=0, dtype=np.float64).astype(np.float32)
    means = {"default_mean": reduced.default_vector_LD, "role_mean": role_mean_LD, "n_default": 1, "n_roles": len(roles)}
    save(folder / "axis.pt", {"axis": reduced.axis_LD, **means})
    save(folder / "assistant_axis.pt", reduced.axis_LD)


def _kind(min_score: int | None) -> str:
    """Which rows a role vector is made of. Never "mean", by which the published code knows the default Assistant."""
    if min_score == PUBLISHED_SCORE:
        return "pos_3"
    return "pos" if min_score is None else f"pos_{min_score}_and_more"


def _note(view: View, rows: int, reduced: Reduced | None) -> dict[str, Any]:
    result = None if reduced is None else {"name": reduced.name, **reduced.attributes}
    return {
        "layers": list(view.layers),
        "rows": rows,
        "left_out": dict(view.left_out),
        "judge": view.judge,
        "identity": view.store.identity,
        "ledger_digest": view.ledger_digest,
        "result": result,
    }


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
