"""The road from a laptop: runs are submitted, asked after and stopped through Ray Jobs, over HTTP.

What travels is small: the resolved job file, and this package as it is installed here, so that the nodes run the caller's version
and need only its dependencies. Credentials never travel: the cluster opens the store by its own chain. Needs no engine.
Ray knows whether a run's driver lives, and nothing else is asked of it: the state of a run is in its store.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

import persona_ray
from persona_ray.config import Job
from persona_ray.errors import InputError, RetryableError
from persona_ray.store.address import absolute_url

ANSWER_WITHIN_S = 5.0
"""A dashboard that does not answer in this time is not there. Ray's own client would wait for ever."""
DRAIN_S = 600
"""A stopped run may take this long to finish what is under way before it is killed. Ray's default, 3 s, is no time for a unit."""
JOB_FILE = "job.yaml"
ENTRYPOINT = f"python -m persona_ray run {JOB_FILE} --address auto --report report.html"
NOT_SHIPPED = ["**/__pycache__", "*.pyc"]
OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables by which Ray's client would replace the address that it is given."""
TOKEN_FILE = "~/.ray/auth_token"  # noqa: S105 (where Ray keeps it)

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


# ---- what can travel


def travelling(job: Job, address: str) -> Job:
    """The job as the cluster at `address` can read it: where the cluster runs on this machine, folders by absolute path.

    Raises InputError for a folder of this machine that another one would have to read or write.
    """
    folders = {place: folder for place, value in _places(job).items() if (folder := _local_folder(place, value)) is not None}
    if folders and not is_loopback(address):
        place, folder = next(iter(folders.items()))
        raise InputError(
            f"{place}: {folder} is on this machine, and the nodes of {urlsplit(dashboard(address)).hostname} do not see it; "
            f"{_INSTEAD[place]}, or run the job there: persona-ray run JOB --address auto"
        )
    document = job.as_dict()
    for place, folder in folders.items():
        section, key = place.split(".")
        document[section][key] = folder
    return Job.model_validate(document)


_INSTEAD = {
    "store.url": "give an s3:, gs: or az: URL",
    "model.id": "give a hub name or a URL in object storage",
    "catalog.source": "take the built-in catalogue",
    "rollouts.path": "give the URL of another run's store in object storage",
    "judge.path": "score later, where the file is",
}


def _places(job: Job) -> dict[str, str | None]:
    """Whatever in a job can name a folder or file."""
    return {
        "store.url": job.store.url,
        "model.id": job.model.id,
        "catalog.source": job.catalog.source,
        "rollouts.path": job.rollouts.path,
        "judge.path": job.judge.path,
    }


def _local_folder(place: str, value: str | None) -> str | None:
    """Absolute path of what is on this machine; None for object storage, the hub, and what the package brings along."""
    if value is None or (place == "catalog.source" and value == "builtin"):
        return None
    if place == "store.url" or value.startswith("file:"):
        url = absolute_url(value)
        return url if url.startswith("/") else None
    if value.startswith("builtin:") or _URL.match(value):
        return None
    path = Path(value).expanduser()
    if place == "model.id" and not path.exists() and not value.startswith((".", "/", "~")):
        return None
    return str(path.absolute())


def is_loopback(address: str) -> bool:
    """Whether the cluster at `address` runs on this machine and so shares its disk. Through a tunnel it only looks so."""
    try:
        found = socket.getaddrinfo(urlsplit(dashboard(address)).hostname, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback for *_, place in found)


def dashboard(address: str) -> str:
    """`head:8265` or `http://head:8265/` as a URL. Raises InputError for anything but http and https."""
    url = (address if "://" in address else f"http://{address}").rstrip("/")
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in {"http", "https"} and parts.hostname not in {None, "", "auto"} and parts.port != 0
    except ValueError:
        is_usable = False
    if not is_usable:
        raise InputError(f"--address {address}: give the dashboard of the cluster's head, such as http://head:8265")
    return url


# ---- the cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What Ray knows of a run."""

    name: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    """Why it failed: the last line that it said."""
    store_url: str | None
    """None: it was not submitted by this package."""
    version: str | None
    """Of the package that was submitted."""
    submitted: str | None
    ended: str | None
    """ISO 8601, UTC."""

    @property
    def is_over(self) -> bool:
        """Its driver has ended."""
        return self.state in {"SUCCEEDED", "FAILED", "STOPPED"}


class Cluster:
    """The runs of the Ray cluster whose dashboard is at `address`."""

    def __init__(self, address: str) -> None:
        """Raises InputError if no cluster answers there, or if it does not accept the token."""
        self.address = dashboard(address)
        self._headers = _credentials(self.address)
        with _own_address(), self._in_words():
            self._client = _job_client(self.address, self._headers)

    def submit(self, job: Job) -> str:
        """Start a run of the job, as `travelling` gives it; answers the run's name. Ray does not start it a second time."""
        run = f"{job.name}-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory(prefix="persona-ray-") as folder, self._in_words(run):
            (Path(folder) / JOB_FILE).write_text(yaml.safe_dump(job.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
            self._client.submit_job(
                entrypoint=ENTRYPOINT,
                submission_id=run,
                runtime_env={
                    "working_dir": folder,
                    "py_modules": [str(Path(persona_ray.__file__).parent)],
                    "excludes": NOT_SHIPPED,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(DRAIN_S)},
                },
                metadata={"store": job.store.url, "job": job.name, "persona_ray": persona_ray.__version__},
            )
        return run

    def run(self, name: str) -> RunState:
        """How a run is. Raises InputError if there is none of that name, RetryableError if the cluster does not answer."""
        with self._in_words(name):
            _require_answer(self.address, self._headers)
            details = self._client.get_job_info(name)
        metadata: Mapping[str, str] = details.metadata or {}
        state = str(details.status.value)
        return RunState(
            name=name,
            state=state,
            message=_last_line(details.message) if state == "FAILED" else "",
            store_url=metadata.get("store"),
            version=metadata.get("persona_ray"),
            submitted=_iso(details.start_time),
            ended=_iso(details.end_time),
        )

    def logs(self, name: str) -> str:
        """What the run's driver has said so far."""
        with self._in_words(name):
            return str(self._client.get_job_logs(name))

    def follow(self, name: str, tell: Callable[[str], None]) -> None:
        """Pass on what the driver has said and says, in pieces, until it has ended."""
        import aiohttp  # noqa: PLC0415 (comes with Ray's client)

        with self._in_words(name):
            self._client.get_job_info(name)  # for a run that is not there: the tail of its log would be said to have broken off
            try:
                asyncio.run(_pass_on(self._client.tail_job_logs(name), tell))
            except aiohttp.ClientError as error:
                raise RetryableError(f"{self.address}: the log broke off ({error}); look again") from error

    def stop(self, name: str) -> bool:
        """Ask the run's driver to finish what is under way and end (SIGTERM). False if it had ended before."""
        with self._in_words(name):
            return bool(self._client.stop_job(name))

    @contextmanager
    def _in_words(self, run: str | None = None) -> Iterator[None]:
        """Ray's client raises RuntimeError for every reply that is not 200, and OSError where there is none."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if run is not None and "status code 404" in str(error):
                raise InputError(f"{run}: {self.address} knows no run of that name") from error
            raise RetryableError(f"{self.address}: {_last_line(str(error))}") from error


def _job_client(address: str, headers: Mapping[str, str]) -> Any:
    """Ray's client. It announces every upload as if something had happened, and is asked not to."""
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 (heavy, and needed by few commands)

    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return JobSubmissionClient(address, headers=dict(headers))


@contextmanager
def _own_address() -> Iterator[None]:
    """Take care that the address on the command line is the one that is asked."""
    hidden = {name: os.environ.pop(name) for name in OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


async def _pass_on(pieces: AsyncIterator[str], tell: Callable[[str], None]) -> None:
    async for piece in pieces:
        tell(piece)


def _iso(milliseconds: int | None) -> str | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _last_line(text: str | None) -> str:
    lines = [line for line in (text or "").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


# ---- who answers at an address


def _credentials(address: str) -> dict[str, str]:
    """Headers with which the cluster lets us in: none if it asks for none, so that a token goes only to who wants one."""
    if _status_of(address, {}) not in {401, 403}:
        return {}
    token = _token()
    if token is None:
        raise InputError(
            f"--address {address}: the cluster asks for its token, and there is none here; "
            f"put it into RAY_AUTH_TOKEN, or into a file that RAY_AUTH_TOKEN_PATH names (default: {TOKEN_FILE})"
        )
    headers = {"Authorization": f"Bearer {token}"}
    if _status_of(address, headers) in {401, 403}:
        raise InputError(
            f"--address {address}: the cluster does not accept this token; RAY_AUTH_TOKEN (or the file that RAY_AUTH_TOKEN_PATH names) "
            "must hold the one that its head was started with"
        )
    return headers


def _token() -> str | None:
    """Ray's places for it, in Ray's order. Raises InputError if the file that is named cannot be read."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named or TOKEN_FILE).expanduser()
    if named is None and not file.is_file():
        return None
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"RAY_AUTH_TOKEN_PATH: {file} cannot be read ({error})") from error


def _require_answer(address: str, headers: Mapping[str, str]) -> None:
    """Raises RetryableError if the dashboard has fallen silent, or does not know us any more: its head may have been replaced."""
    try:
        status = _status_of(address, headers)
    except InputError as error:
        raise RetryableError(str(error)) from error
    if status in {401, 403}:
        raise RetryableError(f"{address}: the token is not accepted any more; was the head started again with another one?")


def _status_of(address: str, headers: Mapping[str, str]) -> int:
    """HTTP status of the dashboard's greeting. Raises InputError if nobody answers in time, or somebody who is not Ray."""
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=dict(headers))  # noqa: S310 (`dashboard` let only http in)
        with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as reply:  # noqa: S310
            json.load(reply)["ray_version"]
            return int(reply.status)
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            return error.code
        raise InputError(f"--address {address}: somebody answers there (HTTP {error.code}), but no Ray dashboard; {_PORT}") from error
    except (OSError, http.client.HTTPException, ValueError, TypeError, LookupError) as error:
        raise InputError(f"--address {address}: {_silence(error)}") from error


_PORT = "its port is 8265 unless the head was started with another"


def _silence(error: Exception) -> str:
    """Why there is no usable answer, in words."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    match cause:
        case socket.gaierror():
            return "there is no such host"
        case TimeoutError():
            return f"no answer within {ANSWER_WITHIN_S:g} s; {_PORT}, and only some networks may reach it"
        case ConnectionRefusedError():
            return f"nothing listens there; {_PORT}"
        case ssl.SSLError():
            return f"no secure connection comes about ({cause})"
        case http.client.HTTPException() | ValueError() | TypeError() | LookupError() | ConnectionError():
            return f"somebody answers there, but no Ray dashboard; {_PORT}"
        case _:
            return f"cannot be reached ({cause})"
