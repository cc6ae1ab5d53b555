"""Principal components of many rows: ours beside scikit-learn's, on the same data in one run, each in a process of its own.

python jobs/benchmark_reduce.py                                              small, half a minute
python jobs/benchmark_reduce.py --rows 20000 --width 4096 --layers 4         the size of one block of layers
python jobs/benchmark_reduce.py --grow --workers 2 --json reduce.json        how costs grow with rows, layers and workers
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

# Before numpy is imported, here and in the processes below: CPU-seconds of several threads cannot be compared.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import numpy as np

from persona_ray.reduce.incremental import IncrementalPCA
from persona_ray.reduce.merging import fold_all, merge_all
from persona_ray.reduce.scatter import Scatter
from persona_ray.spec import Float32, Float64

DIRECTIONS = 300
FIRST = 10
"""Components whose variance is looked at apart from the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is decomposed."""

    rows: int = 4000
    width: int = 1024
    layers: int = 2
    batch: int = 256
    rank: int = 64

    def batches(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each."""
        return ((start, min(start + self.batch, self.rows)) for start in range(0, self.rows, self.batch))


class Rows:
    """Rows with the spectrum of activations, made batch by batch: variance falls as a power law to a floor; massive dims; a far mean."""

    def __init__(self, size: Size) -> None:
        generator = np.random.default_rng(0)
        self.size = size
        number = min(DIRECTIONS, size.width)
        basis_DK = np.linalg.qr(generator.standard_normal((size.width, number)))[0]
        self._basis_KD = (10 * np.arange(1.0, number + 1)[:, None] ** -0.7 * basis_DK.T).astype(np.float32)
        self._mean_D = generator.standard_normal(size.width).astype(np.float32)
        self._mean_D[:3] *= 500

    def batch(self, start: int, stop: int, layer: int) -> Float32:
        """(R, D) float32; the same whoever asks."""
        generator = np.random.default_rng([start, layer])
        strengths_RK = generator.standard_normal((stop - start, len(self._basis_KD)), dtype=np.float32)
        noise_RD = generator.standard_normal((stop - start, self.size.width), dtype=np.float32)
        rows_RD: Float32 = strengths_RK @ self._basis_KD + np.float32(0.05) * noise_RD + self._mean_D
        return rows_RD

    def block(self, span: tuple[int, int]) -> Float32:
        """(R, L, D)."""
        return np.stack([self.batch(*span, layer) for layer in range(self.size.layers)], axis=1)


@dataclass(frozen=True, slots=True)
class Result:
    """What one way gives: its cost without that of making rows, and the variances and directions that it finds."""

    name: str
    wall_s: float
    cpu_s: float
    peak_mb: int
    variance_LK: Float64
    components_LKD: Float32


class Stopwatch:
    """Seconds inside `with` blocks."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.wall_s += time.perf_counter() - self._began[0]
        self.cpu_s += time.process_time() - self._began[1]


def ours(kind: type[IncrementalPCA | Scatter], name: str, size: Size) -> Result:
    """Either of ours, over all layers at once, batch by batch."""
    rows, watch = Rows(size), Stopwatch()
    state: Any = None
    for span in size.batches():
        block_RLD = rows.block(span)
        with watch:
            more: Any = kind.of(block_RLD, size.rank)
            state = more if state is None else state.merge(more)
    with watch:
        found = state.components(np.ones((size.layers, size.width)))
    return Result(name, watch.wall_s, watch.cpu_s, _peak_mb(), found.explained_variance_LK, found.components_LKD.astype(np.float32))


def scikit_incremental(size: Size) -> Result:
    """scikit-learn's IncrementalPCA, batch by batch, one for each layer."""
    from sklearn.decomposition import IncrementalPCA as Theirs  # noqa: PLC0415 - its memory is not ours

    rows, watch, found = Rows(size), Stopwatch(), []
    for layer in range(size.layers):
        theirs = Theirs(size.rank, batch_size=size.batch)
        for start, stop in size.batches():
            batch_RD = rows.batch(start, stop, layer)
            if len(batch_RD) < size.rank:
                continue  # it refuses batches of fewer rows than components
            with watch:
                theirs.partial_fit(batch_RD)
        found.append(theirs)
    return _theirs("scikit-learn IncrementalPCA", watch, found)


def scikit_full(size: Size) -> Result:
    """scikit-learn's PCA on all rows of a layer in memory, with the solver that it chooses for rank 64 of many rows."""
    from sklearn.decomposition import PCA  # noqa: PLC0415 - its memory is not ours

    rows, watch, found = Rows(size), Stopwatch(), []
    for layer in range(size.layers):
        all_ND = np.concatenate([rows.batch(start, stop, layer) for start, stop in size.batches()])
        with watch:
            found.append(PCA(size.rank, svd_solver="auto", random_state=0).fit(all_ND))
    return _theirs("scikit-learn PCA", watch, found)


def _theirs(name: str, watch: Stopwatch, found: Sequence[Any]) -> Result:
    variance_LK = np.stack([theirs.explained_variance_ for theirs in found]).astype(np.float64)
    components_LKD = np.stack([theirs.components_ for theirs in found]).astype(np.float32)
    return Result(name, watch.wall_s, watch.cpu_s, _peak_mb(), variance_LK, components_LKD)


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


WAYS: dict[str, Callable[[Size], Result]] = {
    "incremental": partial(ours, IncrementalPCA, "persona_ray incremental"),
    "scatter": partial(ours, Scatter, "persona_ray scatter"),
    "scikit-incremental": scikit_incremental,
    "scikit-pca": scikit_full,
}


def apart(way: str, size: Size) -> Result:
    """In a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(WAYS[way], size).result()


def errors(found: Result, exact: Result) -> dict[str, float]:
    """Against exact: variances, and directions by the least cosine of each with the exact one of its rank and with their span."""
    relative_LK = np.abs(found.variance_LK / exact.variance_LK - 1)
    cosine_LK = np.abs(np.einsum("lkd,lkd->lk", found.components_LKD, exact.components_LKD))
    spans = [
        np.linalg.svd(ours_KD @ exact_KD.T, compute_uv=False)[-1]
        for ours_KD, exact_KD in zip(found.components_LKD, exact.components_LKD, strict=True)
    ]
    return {
        f"variance_error_first_{FIRST}": float(relative_LK[:, :FIRST].max()),
        "variance_error_all": float(relative_LK.max()),
        f"least_cosine_first_{FIRST}": float(cosine_LK[:, :FIRST].min()),
        "least_cosine_with_span": float(min(spans)),
    }


def side_by_side(size: Size, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """All ways at one size; the scatter is the exact one."""
    found = {}
    for way in WAYS:
        found[way] = apart(way, size)
        tell(f"{found[way].name:<28} {found[way].cpu_s:8.2f} CPU-s {found[way].wall_s:8.2f} s {found[way].peak_mb:6d} MB at its peak")
    baseline = found["scikit-incremental"].cpu_s
    lines = []
    for result in found.values():
        facts = {"name": result.name, "cpu_s": result.cpu_s, "wall_s": result.wall_s, "peak_mb": result.peak_mb}
        lines.append({**facts, "times_less_cpu_than_scikit_incremental": baseline / result.cpu_s, **errors(result, found["scatter"])})
    return lines


def growth(size: Size, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """The incremental way at twice and four times the rows, and twice the layers."""
    lines = []
    for change in ({}, {"rows": 2 * size.rows}, {"rows": 4 * size.rows}, {"layers": 2 * size.layers}):
        bigger = replace(size, **change)
        result = apart("incremental", bigger)
        lines.append({"rows": bigger.rows, "layers": bigger.layers, "cpu_s": result.cpu_s, "peak_mb": result.peak_mb})
        tell(f"{bigger.rows:8d} rows x {bigger.layers} layers {result.cpu_s:8.2f} CPU-s {result.peak_mb:6d} MB")
    return lines


def share(size: Size, spans: Sequence[tuple[int, int]]) -> IncrementalPCA:
    """The state of some batches."""
    rows = Rows(size)
    return fold_all(IncrementalPCA.of(rows.block(span), size.rank) for span in spans)


def with_workers(size: Size, most: int, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Wall seconds with 1, 2, 4 ... processes and one merge, the making of rows included; and what merging changes."""
    lines, spans, alone = [], list(size.batches()), None
    number = 1
    while number <= most:
        began = time.perf_counter()
        with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as pool:
            merged = merge_all(pool.map(partial(share, size), [spans[worker::number] for worker in range(number)]))
        wall_s = time.perf_counter() - began
        variance_LK = merged.components(np.ones((size.layers, size.width))).explained_variance_LK
        alone = variance_LK if alone is None else alone
        apart_by = float(np.abs(variance_LK / alone - 1)[:, :FIRST].max())
        lines.append({"workers": number, "wall_s": wall_s, f"variance_first_{FIRST}_against_one_worker": apart_by})
        tell(f"{number:3d} workers {wall_s:8.2f} s; first {FIRST} variances within {apart_by:.1e} of one worker's")
        number *= 2
    return lines


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field, meaning in {
        "rows": "rows",
        "width": "dims of the residual stream",
        "layers": "layers",
        "batch": "rows at a time",
        "rank": "components",
    }.items():
        parser.add_argument(f"--{field}", type=_positive, default=getattr(Size(), field), help=meaning)
    parser.add_argument("--grow", action="store_true", help="also with more rows and layers")
    parser.add_argument("--workers", type=_positive, default=0, help="also with so many processes")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    given = vars(parser.parse_args())
    size = Size(**{field: given[field] for field in asdict(Size())})
    if min(size.batch, size.width, size.rows) <= size.rank:
        parser.error(f"--rank {size.rank} must be below --rows, --batch and --width: scikit-learn needs full batches")

    def tell(line: str) -> None:
        print(line, file=sys.stderr)

    document: dict[str, Any] = {"size": asdict(size), "ways": side_by_side(size, tell)}
    if given["grow"]:
        document["growth"] = growth(size, tell)
    if given["workers"]:
        document["workers"] = with_workers(size, given["workers"], tell)
    text = json.dumps(document, indent=2)
    if given["json"]:
        given["json"].write_text(text + "\n", encoding="utf-8")
    print(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


if __name__ == "__main__":
    main()
