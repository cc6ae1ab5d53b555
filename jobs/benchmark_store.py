"""How fast a store is written and read, beside the same client that puts and gets the same bytes, as ratios of one run.

python jobs/benchmark_store.py                                            in a temporary folder
python jobs/benchmark_store.py --moto --url s3://team/scratch --json store.json
python jobs/benchmark_store.py --url /dev/shm/bench --link-mb-per-s 200   also as if it were behind a network of that speed

What is measured, and how, is said in persona_ray/bench_store.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from persona_ray.bench_store.report import lines
from persona_ray.bench_store.run import benchmark
from persona_ray.bench_store.settings import HELP, Settings
from persona_ray.errors import PersonaRayError


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="How fast a store is written and read, beside the bare client.")
    parser.add_argument("--url", action="append", default=[], help="folder, or s3:, gs: or az: URL, below which to write; again for more")
    parser.add_argument("--moto", action="store_true", help="also on a moto server, started for this")
    parser.add_argument("--store", help="a store with real activations, whose encoded share is told")
    parser.add_argument("--link-mb-per-s", type=float, help="every place also behind a made-up link of so many megabytes a second")
    parser.add_argument("--json", type=Path, help="file for everything that was measured")
    for name, default in asdict(Settings()).items():
        shown = f"{HELP[name]} (default: {default!r})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=shown)
    given = parser.parse_args(arguments)
    given.settings = Settings(**{name: getattr(given, name) for name in HELP})
    if min([given.link_mb_per_s or 1, *asdict(given.settings).values()]) <= 0:
        parser.error("units, threads, pairs and sizes are larger than nothing")
    return given


def main(arguments: Sequence[str]) -> int:
    """Exit code: 0 done, 1 failed at work, 2 wrong input."""
    given = parsed(arguments)
    try:
        document = benchmark(
            given.settings,
            given.url,
            with_moto=given.moto,
            link_mb_per_s=given.link_mb_per_s,
            store=given.store,
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except PersonaRayError as error:
        print(f"benchmark: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    if given.json is not None:
        given.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines(document)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
