"""The moto server, with conditional puts that are atomic as those of a real service are.

moto looks whether there is an object, and puts one, in two steps, and serves each request in a thread of its own: of two writers
at the same moment both may be told that they were the first.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

from moto.s3.responses import S3Response
from moto.server import main

LOCK = threading.RLock()


def one_by_one(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def locked(*arguments: Any, **options: Any) -> Any:
        with LOCK:
            return method(*arguments, **options)

    return locked


for name in ("_key_response_put", "_key_response_post"):
    setattr(S3Response, name, one_by_one(getattr(S3Response, name)))

if __name__ == "__main__":
    main(sys.argv[1:])
