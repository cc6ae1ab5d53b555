"""What may travel to a cluster, who answers at an address, and what watching makes of a store. No cluster, no Ray."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from persona_ray import submit
from persona_ray.cli import main
from persona_ray.config import Job, parse_job
from persona_ray.errors import InputError, RetryableError
from persona_ray.report import watch as watching
from persona_ray.report.progress import store_progress
from persona_ray.report.watch import Watched, status_line, status_table, watch
from persona_ray.store.prepare import prepare_store
from persona_ray.store.reader import open_store
from tests.store.conftest import Toy

TOKEN = "a1b2c3"  # of the fake dashboard below


def job_with(**sections: dict[str, Any]) -> Job:
    document: dict[str, Any] = {"name": "trip", "model": {"id": "Qwen/Qwen3-4B"}, "store": {"url": "s3://team/trip"}}
    return parse_job(document | sections)


# ---- what can travel


@pytest.mark.parametrize(
    "sections",
    [
        {"store": {"url": "/data/trip"}},
        {"store": {"url": "trip"}},
        {"store": {"url": "file:///data/trip"}},
        {"model": {"id": "./model"}},
        {"model": {"id": "~/model"}},
        {"catalog": {"source": "catalogue.yaml"}},
        {"rollouts": {"source": "import", "path": "conversations"}},
        {"judge": {"backend": "scores", "path": "/data/scores"}},
        {"judge": {"backend": "lexicon", "path": "words.json"}},
    ],
)
def test_a_folder_of_this_machine_stays_here(sections: dict[str, dict[str, Any]]) -> None:
    job = job_with(**sections)
    with pytest.raises(InputError) as error:
        submit.travelling(job, "http://192.0.2.1:8265")
    place = f"{next(iter(sections))}."
    assert str(error.value).startswith(place)
    assert "the nodes of 192.0.2.1 do not see it" in str(error.value)
    near = submit.travelling(job, "http://127.0.0.1:8265").as_dict()
    far = job.as_dict()
    sections_of_both = {name: (values, near[name]) for name, values in far.items() if isinstance(values, dict)}
    changed = {f"{name}.{key}" for name, (one, other) in sections_of_both.items() for key in one if one[key] != other[key]}
    assert changed <= {"store.url", "model.id", "catalog.source", "rollouts.path", "judge.path"}
    for name in changed:
        section, key = name.split(".")
        assert Path(near[section][key]).is_absolute()


def test_a_model_folder_is_told_from_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = job_with()
    assert submit.travelling(job, "http://192.0.2.1:8265") == job
    (tmp_path / "Qwen" / "Qwen3-4B").mkdir(parents=True)
    with pytest.raises(InputError, match=r"model\.id"):
        submit.travelling(job, "http://192.0.2.1:8265")


@pytest.mark.parametrize("url", ["s3://team/trip", "gs://team/trip", "az://team/trip", "fsspec+s3://team/trip"])
def test_what_object_storage_and_the_package_hold_travels_unchanged(url: str) -> None:
    job = job_with(
        store={"url": url},
        model={"id": "s3://team/model"},
        rollouts={"source": "import", "path": "s3://team/other"},
    )
    assert submit.travelling(job, "http://192.0.2.1:8265") == job
    assert submit.travelling(job_with(model={"id": "builtin:tiny-persona"}), "head:8265").model.id == "builtin:tiny-persona"


@pytest.mark.parametrize(
    ("address", "is_near"),
    [
        ("http://localhost:1", True),
        ("127.0.0.1:1", True),
        ("http://[::1]:1", True),
        ("http://192.0.2.1", False),
        ("http://no.such.host.invalid", False),
    ],
)
def test_loopback(address: str, is_near: bool) -> None:
    assert submit.is_loopback(address) is is_near


@pytest.mark.parametrize("address", ["ray://head:10001", "auto", "http://", "", "http://head:notaport", "ftp://head"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(InputError, match="give the dashboard of the cluster's head, such as http://head:8265"):
        submit.dashboard(address)


# ---- who answers


class Service:
    """An HTTP service on loopback, and the authorization of each request."""

    def __init__(self, reply: Callable[[str | None], tuple[int, str]]) -> None:
        self.asked: list[str | None] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.asked.append(self.headers["Authorization"])
                code, text = reply(self.headers["Authorization"])
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(reply: Callable[[str | None], tuple[int, str]]) -> Service:
        services.append(Service(reply))
        return services[-1]

    yield start
    for service in services:
        service.close()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def guarded(authorization: str | None) -> tuple[int, str]:
    if authorization is None:
        return 401, "Unauthorized: Missing authentication token"
    return (200, json.dumps({"ray_version": "2.60.0"})) if authorization == f"Bearer {TOKEN}" else (403, "Forbidden")


def test_a_token_goes_only_to_who_asks_for_one(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    service = serve(lambda _: (200, json.dumps({"ray_version": "2.60.0"})))
    assert submit._credentials(service.address) == {}
    assert service.asked == [None]


def test_a_token_is_found_in_rays_places(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = serve(guarded).address
    with pytest.raises(InputError, match="asks for its token, and there is none here"):
        submit._credentials(address)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert submit._credentials(address) == {"Authorization": f"Bearer {TOKEN}"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"RAY_AUTH_TOKEN_PATH: .*absent cannot be read"):
        submit._credentials(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(InputError, match="does not accept this token") as error:
        submit._credentials(address)
    assert "wrong" not in str(error.value)


def test_a_head_that_is_replaced_while_it_is_watched(serve: Callable[..., Service]) -> None:
    service = serve(guarded)
    submit._require_answer(service.address, {"Authorization": f"Bearer {TOKEN}"})
    with pytest.raises(RetryableError, match="not accepted any more"):
        submit._require_answer(service.address, {"Authorization": "Bearer old"})
    service.close()
    with pytest.raises(RetryableError, match="nothing listens there"):
        submit._require_answer(service.address, {})


def silent() -> socket.socket:
    """Accepts connections, by its backlog, and says nothing."""
    one = socket.create_server(("127.0.0.1", 0))
    one.listen()
    return one


def test_who_is_not_there_is_known_at_once(serve: Callable[..., Service], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ANSWER_WITHIN_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with silent() as mute:
        places = {
            nobody: "nothing listens there",
            f"http://127.0.0.1:{mute.getsockname()[1]}": "no answer within 0.3 s",
            "http://no.such.host.invalid:8265": "there is no such host",
            serve(lambda _: (404, "")).address: "no Ray dashboard",
            serve(lambda _: (200, "<html>")).address: "no Ray dashboard",
            serve(lambda _: (200, "[]")).address: "no Ray dashboard",
            serve(guarded).address.replace("http:", "https:"): "no secure connection",
        }
        for address, words in places.items():
            with pytest.raises(InputError, match=words):
                submit.Cluster(address)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("submit", "absent.yaml", "--address", "http://192.0.2.1:8265"), "cannot be read as a job file"),
        (("submit", "{job}", "--address", "http://192.0.2.1:8265"), "store.url: "),
        (("submit", "{job}", "--address", "http://192.0.2.1:8265", "--set", "stor.url=s3://a/b"), "stor: unknown key"),
        (("submit", "{job}", "--address", "http://127.0.0.1:1"), "nothing listens there"),
        (("submit", "{job}", "--address", "ray://head:10001"), "such as http://head:8265"),
        (("submit", "{job}"), "--address"),
        (("status", "trip-00000000"), "for a run say where"),
        (("watch", "/nowhere/store"), "/nowhere/store"),
        (("watch", "s3://team/trip", "--address", "http://192.0.2.1:8265"), "is a store"),
        (("logs", "trip-00000000", "--address", "http://127.0.0.1:1", "--follow", "--json"), "leave one of them out"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    job = tmp_path / "trip.yaml"
    job.write_text(json.dumps(job_with(store={"url": str(tmp_path / "store")}).as_dict()))
    code, out, err = call(capsys, *(argument.format(job=job) for argument in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err


# ---- watching


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


NOON = 1_800_000_000.0


def test_rates_are_those_of_the_last_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Units of an earlier run, hours ago, and those of the first moment do not count."""
    store = open_store(Toy(rows=40).fill(tmp_path / "store", range(5), refused={1: "empty answer", 9: "too long", 17: "too long"}))
    dates = [NOON - 9000, NOON, NOON + 10, NOON + 30, NOON + 40]
    made = {"hardware": "H100", "tokens": 100, "seconds": {"rollouts": 20.0, "capture": 10.0}, "concurrent_units": 2}
    gpu = {0: {"hardware": "A100"}, 3: {"peak_device_bytes": 61_200_000_000}, 4: {"peak_device_bytes": 40_000_000_000}}
    dated = {
        unit: replace(marker, created=at(dates[unit]), made=made | gpu.get(unit, {})) for unit, marker in store.ledger.markers().items()
    }
    monkeypatch.setattr(store, "markers", lambda: [dated])
    found = store_progress(store, NOON + 60)
    assert found["rows"] == {"asked": 40, "stored": 17, "refused": 3, "reasons": {"too long": 2, "empty answer": 1}}
    assert found["rates"] == {"rows_per_s": 0.3, "tokens_per_s": 7.5, "busy_replicas": 1.12, "over_s": 40.0}
    assert found["seconds_left"] == round(20 / 0.3)
    assert found["hardware"] == {"H100": 4, "A100": 1}
    assert found["peak_device_bytes"] == 61_200_000_000
    console = Console(record=True, width=120)
    console.print(status_table({"run": None, "store": found, "problem": None}))
    assert re.search(r"GPU memory +61\.2 GB at most, on the fullest GPU", console.export_text())
    assert (found["units"], found["is_complete"]) == ({"planned": 10, "committed": 5}, False)
    assert store_progress(store, NOON + 3600)["seconds_left"] is None
    monkeypatch.setattr(store, "markers", lambda: [{0: dated[0]}])
    alone = store_progress(store, NOON)
    assert alone["rates"] is alone["peak_device_bytes"] is None
    monkeypatch.setattr(store, "markers", lambda: [{}])
    none = store_progress(store, NOON)
    assert none["last_commit"] is none["rates"] is None


def test_money_is_told_where_its_price_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four GPUs, 30 s for each unit, two of which are under way at once: 60 GPU-seconds a unit of four rows."""
    job = job_with(store={"url": str(tmp_path / "store")}, shards={"accelerator": "H100", "stages": 4}, limits={"gpu_hour_price": 36})
    toy = Toy(rows=40)
    prepare_store(str(tmp_path / "store"), identity=toy.identity(), plan=toy.plan, job=job.as_dict())
    store = open_store(toy.fill(tmp_path / "store", range(5)))
    made = {"seconds": {"rollouts": 20.0, "capture": 10.0}, "stages": 4, "concurrent_units": 2}
    dated = {unit: replace(marker, made=made, created=at(NOON + 10 * unit)) for unit, marker in store.ledger.markers().items()}
    monkeypatch.setattr(store, "markers", lambda: [dated])
    found = store_progress(store, NOON + 60)
    assert found["money"] == {"spent": 3.0, "left": 3.0, "per_gpu_hour": 36, "source": "limits.gpu_hour_price"}
    facts = {"run": None, "store": found, "problem": None}
    assert "money 3.00, 3.00 left" in status_line(facts)
    console = Console(record=True, width=200)
    console.print(status_table(facts))
    assert "about 3.00 spent and 3.00 left (at 36 an hour of a GPU, limits.gpu_hour_price;" in console.export_text()
    nobody_knows = open_store(Toy().fill(tmp_path / "other"))
    assert store_progress(nobody_knows, NOON)["money"] is None


def test_a_store_is_watched_to_its_last_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy, url = Toy(), str(tmp_path / "store")
    toy.fill(url, range(1))
    grown = iter([range(2), range(2), range(3)])
    monkeypatch.setattr(watching.time, "sleep", lambda _: toy.fill(url, next(grown)))
    console = Console(record=True, width=200)
    facts = watch(Watched(store_url=url), console, 1)
    assert (facts["is_over"], facts["has_failed"], facts["run"]) == (True, False, None)
    said = [line.split(" ", 1)[1] for line in console.export_text().splitlines()]
    assert [line.partition(",")[0] for line in said] == ["4 of 10 rows", "8 of 10 rows", "10 of 10 rows"], said
    assert "axis not computed yet" in said[-1]


def test_a_terminal_is_drawn_on_in_place(tmp_path: Path) -> None:
    url = Toy().fill(tmp_path / "store", refused={1: "empty answer"})
    console = Console(record=True, width=120, force_terminal=True)
    watch(Watched(store_url=url), console, 1)
    shown = console.export_text()
    for words in ("10 of 10: 9 stored, 1 refused", "1 x empty answer", "3 of 3 committed", "last commit"):
        assert words in shown


class Head:
    """Answers in turn with a state, or with silence (None)."""

    def __init__(self, store: str | None, *states: str | None) -> None:
        self._store, self._states = store, list(states)

    def __call__(self) -> dict[str, Any]:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if state is None:
            raise RetryableError("http://head:8265: no answer")
        message = "persona-ray: no GPU" if state == "FAILED" else ""
        return {"name": "trip-1", "state": state, "message": message, "store": self._store, "submitted": at(NOON), "ended": None}


@pytest.mark.parametrize(("end", "has_failed"), [("SUCCEEDED", False), ("FAILED", True), ("STOPPED", True)])
def test_a_run_is_watched_to_its_end_whatever_its_store_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, has_failed: bool
) -> None:
    url = str(tmp_path / "store")
    steps = iter([lambda: None, lambda: Toy().fill(url), lambda: None])
    monkeypatch.setattr(watching.time, "sleep", lambda _: next(steps)())
    console = Console(record=True, width=200)
    facts = watch(Watched(Head(url, "PENDING", "RUNNING", None, end)), console, 1)
    said = [line.split(" ", 1)[1] for line in console.export_text().splitlines()]
    assert said[:2] == ["pending, the store is not begun yet", "running, the store is not begun yet"]
    assert said[2].startswith("silent (http://head:8265: no answer), 10 of 10 rows")
    assert said[3].startswith(f"{end.lower()}{' (persona-ray: no GPU)' if end == 'FAILED' else ''}, 10 of 10 rows")
    assert (facts["is_over"], facts["has_failed"]) == (True, has_failed)


def test_a_head_that_stays_silent_ends_the_watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "SILENCE_S", 0.0)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    with pytest.raises(RetryableError, match="no answer"):
        watch(Watched(Head(Toy().fill(tmp_path / "store"), "RUNNING", None)), Console(quiet=True), 1)


def test_a_store_that_cannot_be_read_from_here_and_a_run_that_is_not_ours() -> None:
    for store, words in (("ftp://nowhere", "is not served"), (None, "not submitted by persona-ray")):
        facts = Watched(Head(store, "RUNNING")).look()
        assert facts["store"] is None
        assert words in facts["problem"]
        assert words in status_line(facts)
        assert status_table(facts).row_count == 4


def test_status_and_watch_of_a_store_by_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = Toy().fill(tmp_path / "store", range(2), refused={1: "empty answer"})
    code, out, err = call(capsys, "status", url, "--json")
    facts = json.loads(out)
    assert (code, err, facts["store"]["rows"]["refused"], facts["is_over"]) == (0, "", 1, False)
    code, out, _ = call(capsys, "watch", url, "--once")
    assert code == 0
    assert "2 of 3 committed" in out
    Toy().fill(url)
    code, out, _ = call(capsys, "watch", url)
    assert code == 0
    assert "10 of 10 rows, 1 refused" in out
