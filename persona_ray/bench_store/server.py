"""An S3 server made for tests, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from persona_ray.errors import InputError


@contextmanager
def moto() -> Iterator[str]:
    """URL of a bucket on a moto server; the environment says how to reach it."""
    if importlib.util.find_spec("moto") is None:
        raise InputError("--moto needs the package moto: pip install 'moto[server]'")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    access = {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "us-east-1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    # Its log is one line for each request.
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], **quiet)  # noqa: S603 (ours)
    try:
        _create_bucket(f"{endpoint}/benchmark", server)
        with patch.dict(os.environ, others | access, clear=True):
            yield "s3://benchmark"
    finally:
        server.kill()
        server.wait()


def _create_bucket(bucket: str, server: subprocess.Popen[bytes]) -> None:
    """As soon as the server is there."""
    end_s = time.monotonic() + 60
    request = urllib.request.Request(bucket, method="PUT")  # noqa: S310 (http, to this machine)
    while True:
        try:
            urllib.request.urlopen(request, timeout=10).close()  # noqa: S310
        except OSError as error:
            if server.poll() is not None or time.monotonic() > end_s:
                raise InputError(f"--moto: the server does not start ({error}); does `python -m moto.server` run here?") from error
            time.sleep(0.1)
        else:
            return
