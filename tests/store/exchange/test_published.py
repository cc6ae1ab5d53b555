"""The published layout: written as its own loaders read it, and read back as a store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_ray.errors import InputError
from persona_ray.store.exchange.published import export_published
from persona_ray.store.exchange.published_import import import_published
from persona_ray.store.reader import StoreReader, open_store

from .conftest import LEFT_OUT, judge_all, reduce_all, rows_of, without_us

# The calls by which the published code reads its own files: steps 3, 4 and 5 of its pipeline, and load_axis.
READ = """
from pathlib import Path
import torch
root = Path(sys.argv[1])
load = lambda path: torch.load(path, map_location="cpu", weights_only=True)
answer = {"roles": [path.stem for path in sorted((root / "activations").glob("*.pt"))], "lines": {}, "activations": {}, "vectors": {}}
for path in sorted((root / "responses").glob("*.jsonl")):
    answer["lines"][path.stem] = [json.loads(line) for line in open(path)]
for path in sorted((root / "activations").glob("*.pt")):
    loaded = load(path)
    answer["activations"][path.stem] = {key: [str(act.dtype), act.float().tolist()] for key, act in loaded.items()}
    assert torch.stack(list(loaded.values())).mean(dim=0).shape == next(iter(loaded.values())).shape
    assert len({act.untyped_storage().data_ptr() for act in loaded.values()}) == len(loaded)
answer["scores"] = {path.stem: json.load(open(path)) for path in sorted((root / "scores").glob("*.json"))}
default_vectors, role_vectors = [], []
for path in sorted((root / "vectors").glob("*.pt")):
    data = load(path)
    answer["vectors"][path.stem] = [data["type"], data["role"]]
    if data["role"] == "default" or data.get("type", "unknown") == "mean":
        default_vectors.append(data["vector"])
    else:
        role_vectors.append(data["vector"])
    if data["role"] != "default":
        assert torch.equal(load(root / "role_vectors" / path.name), data["vector"])
axis = torch.stack(default_vectors).mean(dim=0) - torch.stack(role_vectors).mean(dim=0)
saved = load(root / "axis.pt")
answer["axis"] = [axis.tolist(), saved["axis"].tolist(), load(root / "assistant_axis.pt").tolist()]
answer["means"] = [(saved["default_mean"] - saved["role_mean"]).tolist(), saved["n_default"], saved["n_roles"]]
"""


@pytest.fixture(scope="module")
def published(store: StoreReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "out"
    done = export_published(store, folder)
    assert (done.rows, done.left_out) == (len(rows_of(store)), LEFT_OUT)
    assert not [name for name in done.files if "raw" in name]
    return folder


def test_the_published_loaders_read_it(store: StoreReader, expected: dict, published: Path) -> None:
    found = without_us(READ, published)
    assert found["roles"] == ["bard", "default", "ghost", "sage"]
    for archetype in found["roles"]:
        rows = {
            f"pos_p{r.key.system_prompt}_q{r.key.question}": row for row in expected.values() if (r := row[0]).key.archetype == archetype
        }
        assert found["activations"][archetype].keys() == rows.keys()
        lines = found["lines"][archetype]
        assert [f"{line['label']}_p{line['prompt_index']}_q{line['question_index']}" for line in lines] == list(
            found["activations"][archetype]
        )
        for line in lines:
            assert set(line) == {"system_prompt", "prompt_index", "question_index", "question", "conversation", "label"}
            rollout, score, values_LD = rows[f"pos_p{line['prompt_index']}_q{line['question_index']}"]
            assert (line["system_prompt"], line["question"]) == (rollout.system_prompt, rollout.question)
            assert line["conversation"] == [
                {"role": "user", "content": f"{rollout.system_prompt}\n\n{rollout.question}"},
                {"role": "assistant", "content": rollout.response},
            ]
            dtype, values = found["activations"][archetype][f"pos_p{line['prompt_index']}_q{line['question_index']}"]
            assert dtype == "torch.bfloat16"
            np.testing.assert_array_equal(np.array(values, np.float32), values_LD)
            assert found["scores"][archetype].get(f"pos_p{line['prompt_index']}_q{line['question_index']}", -1) == score
    assert found["vectors"] == {"default": ["mean", "default"], **{role: ["pos_3", role] for role in ("bard", "ghost", "sage")}}
    reduced = store.reduced(str(store.latest_reduced()))
    for axis in (*found["axis"], found["means"][0]):
        np.testing.assert_allclose(axis, reduced.axis_LD, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.array(found["axis"][2], np.float32), reduced.axis_LD)
    assert found["means"][1:] == [1, 3]


@pytest.mark.parametrize("store_dtype", ["bf16-exact", "float32"])
def test_there_and_back_again(make_store: Callable[..., StoreReader], tmp_path: Path, store_dtype: str) -> None:
    store = make_store(tmp_path / "store", store_dtype=store_dtype)
    export_published(store, tmp_path / "out")
    units: list[int] = []
    done = import_published(tmp_path / "out", str(tmp_path / "back"), model_id="toy/model", unit_rows=4, progress=units.append)
    back, ours = open_store(str(tmp_path / "back")), rows_of(store)
    assert (done.rows, done.left_out, done.scores_without_row) == (len(ours), {}, 0)
    assert sum(units) == -(-len(ours) // 4)
    assert (back.layers, back.hidden_size, back.default_archetypes) == ((0, 3), 6, ("default",))
    assert back.identity["store_dtype"] == store_dtype
    assert (back.identity["span_rule"], back.identity["tokenizer_digest"], back.identity["model_id"]) == (
        "published",
        "unknown",
        "toy/model",
    )
    key = lambda row: (row[0].key.archetype, row[0].key.system_prompt, row[0].key.question)  # noqa: E731
    theirs = {key(row): row for row in rows_of(back).values()}
    assert theirs.keys() == {key(row) for row in ours.values()}
    for row in ours.values():
        rollout, score, values_LD = theirs[key(row)]
        np.testing.assert_array_equal(values_LD, row[2])
        assert (score, rollout.key.turn) == (row[1], row[0].key.turn)
        assert (rollout.system_prompt, rollout.question, rollout.response) == (row[0].system_prompt, row[0].question, row[0].response)
        assert (len(rollout.token_ids), rollout.response_start, rollout.response_end) == (0, 0, 0)
    again, before = reduce_all(back), store.reduced(str(store.latest_reduced()))
    np.testing.assert_allclose(again.axis_LD, before.axis_LD, rtol=1e-6, atol=1e-6)
    assert sorted(again.role_count_A.tolist()) == sorted(before.role_count_A.tolist())


def test_an_export_of_an_import_is_the_same_files(published: Path, tmp_path: Path) -> None:
    import_published(published, str(tmp_path / "back"), model_id="toy/model")
    export_published(open_store(str(tmp_path / "back")), tmp_path / "out")
    for file in published.glob("responses/*.jsonl"):
        assert (tmp_path / "out/responses" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "out/scores" / f"{file.stem}.json").read_bytes() == (published / "scores" / f"{file.stem}.json").read_bytes()
        ours, theirs = (torch.load(root / "activations" / f"{file.stem}.pt", weights_only=True) for root in (published, tmp_path / "out"))
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_interrupted_import_goes_on(published: Path, tmp_path: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    arguments: dict[str, Any] = {"model_id": "toy/model", "unit_rows": 4}
    with pytest.raises(KeyboardInterrupt):
        import_published(published, str(tmp_path / "back"), progress=interrupt, **arguments)
    assert open_store(str(tmp_path / "back")).ledger.committed() == {0}
    done = import_published(published, str(tmp_path / "back"), **arguments)
    assert done.rows == len(rows_of(open_store(str(tmp_path / "back"))))
    assert import_published(published, str(tmp_path / "back"), **arguments) == done
    with pytest.raises(InputError, match="belongs to another experiment: model_id"):
        import_published(published, str(tmp_path / "back"), model_id="other/model", unit_rows=4)


# ---- an import of files that are not as they should be


def line(prompt: int, question: int, *, answer: str | None = "Aye.", more: tuple[dict[str, str], ...] = ()) -> dict[str, Any]:
    said = () if answer is None else ({"role": "assistant", "content": answer},)
    conversation = [{"role": "system", "content": "Be."}, {"role": "user", "content": "What?"}, *said, *more]
    return {
        "system_prompt": "Be.",
        "prompt_index": prompt,
        "question_index": question,
        "question": "What?",
        "conversation": conversation,
        "label": "pos",
    }


def write(root: Path, role: str, lines: list[dict[str, Any]], activations: dict[str, Any], scores: Any = None) -> None:
    for folder in ("responses", "activations", "scores"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / f"responses/{role}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    torch.save(activations, root / f"activations/{role}.pt")
    if scores is not None:
        (root / f"scores/{role}.json").write_text(json.dumps(scores))


def values(seed: int = 0, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_what_cannot_be_a_row_is_refused_with_its_reason(tmp_path: Path) -> None:
    twice = ({"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."})
    lines = [
        line(0, 0),
        line(0, 1),
        line(0, 2),
        line(0, 3, answer=" \n"),
        line(0, 4, more=twice),
        line(0, 5),
        line(0, 5),
        line(0, 6, answer=None),
    ]
    known = {f"pos_p0_q{q}": values(q) for q in (0, 2, 3, 4, 5, 6, 9)}
    known["pos_p0_q2"][1, 1] = float("nan")
    write(tmp_path / "in", "bard", lines, known, {"pos_p0_q0": 3, "pos_p0_q1": 1, "pos_p7_q7": 0})
    write(tmp_path / "in", "default", [line(1, 0, more=({"role": "user", "content": "Go on."},))], {"pos_p1_q0": values(20)})
    (tmp_path / "in/responses/mute.jsonl").write_text(json.dumps(line(0, 0)))
    done = import_published(tmp_path / "in", str(tmp_path / "store"), model_id="m", layers=[4, 9])
    store = open_store(str(tmp_path / "store"))
    assert store.layers == (4, 9)
    assert store.default_archetypes == ("default",)
    assert (done.rows, done.scores_without_row, done.files) == (2, 1, 6)
    assert done.left_out == {
        "an answer without its activation": 2,
        "an activation without an answer": 1,
        "activations are not finite": 1,
        "empty answer": 2,
        "several answers share one activation, their mean": 1,
        "several answers have the same indices, so whose activation it is cannot be known": 2,
    }
    (first, score, values_LD), (second, unscored, _) = rows_of(store).values()
    assert (first.key.archetype, first.key.question, first.key.turn, first.response, score) == ("bard", 0, 2, "Aye.", 3)
    assert (second.key.archetype, second.key.system_prompt, second.key.turn, unscored) == ("default", 1, 2, -1)
    np.testing.assert_array_equal(values_LD, values(0).float().numpy())


def test_mixed_precision_loses_nothing(tmp_path: Path) -> None:
    kinds = {"pos_p0_q0": values(0), "pos_p0_q1": values(1, torch.float32), "pos_p0_q2": values(2, torch.float16)}
    write(tmp_path / "in", "bard", [line(0, q) for q in range(3)], kinds)
    import_published(tmp_path / "in", str(tmp_path / "store"), model_id="m")
    store = open_store(str(tmp_path / "store"))
    assert (store.identity["store_dtype"], store.latest_scores(), store.layers) == ("float32", None, (0, 1))
    for row, kind in zip(rows_of(store).values(), kinds.values(), strict=True):
        np.testing.assert_array_equal(row[2], kind.float().numpy())


def test_the_format_before_zip_files(tmp_path: Path) -> None:
    write(tmp_path / "in", "bard", [line(0, 0)], {})
    torch.save({"pos_p0_q0": values()}, tmp_path / "in/activations/bard.pt", _use_new_zipfile_serialization=False)
    assert import_published(tmp_path / "in", str(tmp_path / "store"), model_id="m").rows == 1


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def spoil(root: Path, name: str) -> None:
    """A good folder with one fault."""
    write(root, "bard", [line(0, 0), line(0, 1)], {"pos_p0_q0": values(), "pos_p0_q1": values(1)}, {"pos_p0_q0": 3})
    pt, jsonl, scores = root / "activations/bard.pt", root / "responses/bard.jsonl", root / "scores/bard.json"
    faults: dict[str, Callable[[], Any]] = {
        "pickle": lambda: torch.save({"pos_p0_q0": Evil()}, pt),
        "truncated": lambda: pt.write_bytes(pt.read_bytes()[:300]),
        "text": lambda: pt.write_bytes(b"hello"),
        "raw tensor": lambda: torch.save(values(), pt),
        "whole numbers": lambda: torch.save({"pos_p0_q0": torch.ones(2, 3, dtype=torch.int64)}, pt),
        "shapes": lambda: torch.save({"pos_p0_q0": values(), "pos_p0_q1": values(shape=(2, 4))}, pt),
        "tokens": lambda: torch.save({"pos_p0_q0": values(shape=(2, 5, 3))}, pt),
        "empty": lambda: torch.save({}, pt),
        "key": lambda: torch.save({"first": values()}, pt),
        "strangers": lambda: torch.save({"pos_p5_q5": values()}, pt),
        "no activations": pt.unlink,
        "no responses": jsonl.unlink,
        "axis alone": lambda: (pt.unlink(), torch.save(values(), root / "assistant_axis.pt")),
        "not json": lambda: jsonl.write_text(json.dumps(line(0, 0)) + "\n{broken"),
        "no index": lambda: jsonl.write_text('{"question": "What?", "question_index": 0, "conversation": []}'),
        "not utf-8": lambda: jsonl.write_bytes(b"\xff\xfe"),
        "half a pair": lambda: jsonl.write_text(json.dumps(line(0, 0, answer="\ud800"))),
        "score": lambda: scores.write_text('{"pos_p0_q0": 4}'),
        "scores": lambda: scores.write_text("[3]"),
        "note": lambda: (root / "export.json").write_text("{}"),
    }
    faults[name]()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("pickle", "bard.pt: cannot be read as tensors"),
        ("truncated", "bard.pt: cannot be read as tensors"),
        ("text", "bard.pt: cannot be read as tensors"),
        ("raw tensor", "bard.pt: is not a file of activations"),
        ("whole numbers", "bard.pt: is not a file of activations"),
        ("shapes", r"pos_p0_q1 of .*bard.pt is \(2, 4\)"),
        ("tokens", r"pos_p0_q0 of .*bard.pt is \(2, 5, 3\)"),
        ("empty", "its files of activations are empty"),
        ("key", "'first' names no row"),
        ("strangers", "no answer in responses has its activation"),
        ("no activations", "holds no activations/{role}.pt"),
        ("no responses", "holds no responses/{role}.jsonl"),
        ("axis alone", "holds assistant_axis.pt, and no activations/{role}.pt"),
        ("not json", "bard.jsonl, line 2: not JSON"),
        ("no index", "bard.jsonl, line 1: prompt_index: field required"),
        ("not utf-8", "bard.jsonl: cannot be read"),
        ("half a pair", "bard.jsonl, line 1: half of a surrogate pair"),
        ("score", "bard.json: pos_p0_q0: a score is a whole number from 0 to 3, this is 4"),
        ("scores", "bard.json: scores are a JSON object"),
        ("note", "export.json: cannot be read"),
    ],
)
def test_bad_files_are_one_line_and_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, complaint: str) -> None:
    spoil(tmp_path / "in", name)
    with pytest.raises(InputError, match=complaint) as caught:
        import_published(tmp_path / "in", str(tmp_path / "store"), model_id="m")
    assert "\n" not in str(caught.value)
    assert "executed" not in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("layers", [(1,), (1, 0), (3, 3), (-1, 2)])
def test_layers_must_be_those_of_the_activations(tmp_path: Path, layers: tuple[int, ...]) -> None:
    write(tmp_path / "in", "bard", [line(0, 0)], {"pos_p0_q0": values()})
    with pytest.raises(InputError, match="the activations have 2 layers"):
        import_published(tmp_path / "in", str(tmp_path / "store"), model_id="m", layers=layers)


def test_other_places_are_refused(tmp_path: Path, published: Path, make_toy: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="is no folder"):
        import_published(tmp_path / "nowhere", str(tmp_path / "store"), model_id="m")
    make_toy().fill(tmp_path / "store")
    with pytest.raises(InputError, match="belongs to another experiment"):
        import_published(published, str(tmp_path / "store"), model_id="m")
    write(tmp_path / "in", "bard", [line(0, 0)], {"pos_p0_q0": values()})
    import_published(tmp_path / "in", str(tmp_path / "mine"), model_id="m")
    (tmp_path / "in/responses/bard.jsonl").write_text(json.dumps(line(0, 0)) + "\n" + json.dumps(line(0, 1)))
    with pytest.raises(InputError, match="is a store of other rows already"):
        import_published(tmp_path / "in", str(tmp_path / "mine"), model_id="m")


# ---- stores that the layout cannot hold


def test_samples_and_turns_cannot_be_told_apart(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    class Sampled(type(make_toy())):  # type: ignore[misc]
        @property
        def plan(self) -> Any:
            from persona_ray.spec import Plan, RowKey

            keys = tuple(RowKey("bard", 0, 0, sample=sample, turn=1) for sample in range(4))
            return Plan(archetypes=("bard",), default_archetypes=(), keys=keys, unit_rows=4)

    store = open_store(Sampled(rows=4).fill(tmp_path / "store"))
    with pytest.raises(InputError, match=r"4 rows of bard .* pos_p0_q0 and cannot tell samples or turns apart"):
        export_published(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_default_assistant_gets_the_name_that_marks_it(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    store = open_store(make_toy(archetypes=("assistant", "bard")).fill(tmp_path / "store"))
    export_published(store, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/responses").iterdir()) == ["bard.jsonl", "default.jsonl"]
    assert not (tmp_path / "out/vectors").exists(), "nothing was reduced"
    assert not (tmp_path / "out/scores").exists(), "nothing was judged"
    posing = open_store(make_toy(archetypes=("assistant", "default")).fill(tmp_path / "posing"))
    with pytest.raises(InputError, match="'default' is a role here"):
        export_published(posing, tmp_path / "posed")


def test_some_layers(store: StoreReader, expected: dict, tmp_path: Path) -> None:
    export_published(store, tmp_path / "out", layers=[3])
    first = expected[0]
    found = torch.load(tmp_path / "out/activations/default.pt", weights_only=True)[
        f"pos_p{first[0].key.system_prompt}_q{first[0].key.question}"
    ]
    np.testing.assert_array_equal(found.float().numpy(), first[2][1:])
    assert tuple(torch.load(tmp_path / "out/axis.pt", weights_only=True)["axis"].shape) == (1, 6)
    import_published(tmp_path / "out", str(tmp_path / "back"), model_id="m")
    assert open_store(str(tmp_path / "back")).layers == (3,)


def test_the_export_takes_one_state_of_a_growing_store(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    toy = make_toy(rows=12)
    store = open_store(toy.fill(tmp_path / "store", units=range(2)))
    before = store.snapshot().digest
    done = export_published(store, tmp_path / "out", progress=lambda _: toy.fill(tmp_path / "store") and None)
    assert (done.rows, done.ledger_digest) == (8, before)
    assert store.snapshot().digest != before
    judge_all(store)
