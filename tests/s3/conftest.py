"""Stores on a real S3 protocol: a server in its own process, a spoiling proxy before it, a bucket for each test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import botocore.session
import pytest

from tests.s3.proxy import Proxy
from tests.store.conftest import Toy

CEPH = "PERSONA_RAY_TEST_S3"
ROOT = Path(__file__).parents[2]
SERVICES = ("moto", pytest.param("ceph", marks=pytest.mark.ceph))
PREFIXES = {"obstore": "", "fsspec": "fsspec+"}


@dataclass(frozen=True)
class Service:
    """A server and the way to it."""

    name: str
    proxy: Proxy
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.proxy.url,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """For what a store never does itself; not through the proxy."""
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=f"http://{self.proxy.target}",
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name="us-east-1",
        )


@dataclass(frozen=True)
class Place:
    """Where a store may be, by some client."""

    url: str
    service: Service | None
    """None: a folder."""

    @property
    def proxy(self) -> Proxy:
        assert self.service is not None
        return self.service.proxy

    @property
    def bucket(self) -> str:
        return urlsplit(self.url).netloc

    def put(self, key: str, data: bytes) -> None:
        """As a stranger does: over whatever is there."""
        if self.service is None:
            target = Path(self.url) / key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        else:
            self.service.client().put_object(Bucket=self.bucket, Key=f"{urlsplit(self.url).path.strip('/')}/{key}", Body=data)

    def contents(self) -> dict[str, str]:
        """Everything in the bucket or folder, by name: entity tag, or bytes."""
        if self.service is None:
            return {str(path): path.read_bytes().hex() for path in sorted(Path(self.url).rglob("*")) if path.is_file()}
        pages = self.service.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket)
        return {item["Key"]: item["ETag"] for page in pages for item in page.get("Contents", ())}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")


@pytest.fixture(scope="session")
def moto() -> Iterator[Service]:
    port = _free_port()
    # Its log is one line for each request.
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.s3.moto_server", "-H", "127.0.0.1", "-p", str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, process)
        proxy = Proxy(f"127.0.0.1:{port}")
        yield Service("moto", proxy, "testkey", "testsecret")
        proxy.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def ceph() -> Iterator[Service]:
    endpoint = os.environ.get(CEPH)
    if endpoint is None:
        pytest.skip(f"{CEPH} names no endpoint; infra/s3/up starts one")
    proxy = Proxy(urlsplit(endpoint).netloc)
    yield Service("ceph", proxy, "testkey", "testsecret")
    proxy.close()


@pytest.fixture
def make_place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Place]]:
    """(client, service) -> a place in a new bucket, credentials in the environment."""
    used: list[tuple[Service, str]] = []

    def make(client: str, name: str) -> Place:
        service: Service = request.getfixturevalue(name)
        for variable in [variable for variable in os.environ if variable.startswith("AWS_") and variable != "AWS_CA_BUNDLE"]:
            monkeypatch.delenv(variable)
        for variable, value in service.environment.items():
            monkeypatch.setenv(variable, value)
        bucket = f"test-{uuid.uuid4().hex}"
        service.client().create_bucket(Bucket=bucket)
        used.append((service, bucket))
        return Place(f"{PREFIXES[client]}s3://{bucket}/runs/one", service)

    yield make
    for service, bucket in used:
        service.proxy.heal()
        _remove(service.client(), bucket)


def _remove(client: Any, bucket: str) -> None:
    """A server that outlives the tests must not fill up."""
    client.delete_bucket_policy(Bucket=bucket)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
        keys = [{"Key": item["Key"]} for item in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket=bucket, Delete={"Objects": keys})
    client.delete_bucket(Bucket=bucket)


@pytest.fixture(params=SERVICES)
def service_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=sorted(PREFIXES))
def remote(request: pytest.FixtureRequest, make_place: Callable[[str, str], Place], service_name: str) -> Place:
    """Every client on every service."""
    return make_place(request.param, service_name)


@pytest.fixture(
    params=[
        "folder",
        *(f"{client}-moto" for client in PREFIXES),
        *(pytest.param(f"{client}-ceph", marks=pytest.mark.ceph) for client in PREFIXES),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Every kind of place."""
    client, _, service = request.param.partition("-")
    if client == "folder":
        return Place(str(tmp_path / "one"), None)
    make: Callable[[str, str], Place] = request.getfixturevalue("make_place")
    return make(client, service)


@pytest.fixture
def toy() -> Toy:
    """Two dozen units: several hundred requests."""
    return Toy(rows=94, unit_rows=4)
