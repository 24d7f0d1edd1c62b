"""k-means beside faiss: seconds, objective, peak memory.

    python -m benchmarks.kmeans              # both sizes of the table, some ten minutes on two cores
    python -m benchmarks.kmeans --small      # a minute, to see that it runs

Points are patches of the photographs inside scikit-image and scikit-learn; both start from the same k of them, run the
same number of iterations over all points with the same number of threads, in turn. The objective given is that of the
final centroids, computed the same way for both: assignment by float32 products, squared differences summed in float64.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.harness import alternate, machine, markdown_table, mean_and_deviation, paired_ratio, rewrite
from benchmarks.photographs import crops

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"


class Case(NamedTuple):
    """One row of the table."""

    points: int
    patch_size: int
    k: int
    iters: int = 10

    def __str__(self) -> str:
        return f"{self.points} × {3 * self.patch_size**2}, k = {self.k}, {self.iters} iterations"


CASES = [Case(500_000, 16, 2048), Case(100_000, 8, 8192)]
SMALL = [Case(20_000, 16, 256), Case(10_000, 8, 512)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small sizes; the page is left alone")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each, in turn")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _measure_memory(*arguments.child)
        return
    header = [
        "points",
        "faiss s",
        "ours s",
        "ours / faiss",
        "objective ours / faiss",
        "matrix MiB",
        "peak MiB faiss",
        "peak MiB ours",
        "peak MiB ours, from disk",
    ]
    rows = [_row(case, arguments.rounds) for case in (SMALL if arguments.small else CASES)]
    text = f"{machine()}; `python -m benchmarks.kmeans`, {arguments.rounds} rounds in turn\n\n"
    text += markdown_table(header, rows)
    print(text)
    if not arguments.small and PAGE.exists() and "<!-- kmeans -->" in PAGE.read_text():
        rewrite(PAGE, "kmeans", text)


def _row(case: Case, rounds: int) -> list[str]:
    import faiss

    from patchloom.tokenizers.kmeans import kmeans

    faiss.omp_set_num_threads(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        file, start_file = Path(folder) / "points.npy", Path(folder) / "start.npy"
        matrix = crops(case.points, case.patch_size).astype(np.float32) / np.float32(255)
        start = matrix[np.random.default_rng(1).permutation(case.points)[: case.k]].copy()
        np.save(file, matrix)
        np.save(start_file, start)
        found: dict[str, np.ndarray] = {}

        def peer() -> None:
            clustering = faiss.Kmeans(matrix.shape[1], case.k, niter=case.iters, max_points_per_centroid=10**9)
            clustering.train(matrix, init_centroids=start)
            if len(clustering.obj) != case.iters:
                print(f"faiss stopped after {len(clustering.obj)} iterations", file=sys.stderr)
            found["faiss"] = clustering.centroids

        def ours() -> None:
            result = kmeans(torch.from_numpy(matrix), case.k, iters=case.iters, init=torch.from_numpy(start))
            found["ours"] = result.centroids.numpy()

        seconds = alternate({"faiss": peer, "ours": ours}, rounds=rounds, warmup=0)
        objective = {name: _objective(matrix, centroids) for name, centroids in found.items()}
        peak = {way: _peak(way, file, start_file, case) for way in ("nothing", "faiss", "ours", "ours from disk")}
    return [
        str(case),
        mean_and_deviation(seconds["faiss"], 1),
        mean_and_deviation(seconds["ours"], 1),
        f"{paired_ratio(seconds['ours'], seconds['faiss']):.2f}",
        f"{objective['ours'] / objective['faiss']:.5f}",
        f"{case.points * 3 * case.patch_size**2 * 4 / 2**20:.0f}",
        *(f"{peak[way]:.0f}" for way in ("faiss", "ours", "ours from disk")),
    ]


def _objective(matrix: np.ndarray, centroids: np.ndarray) -> float:
    """Sum of squared distances to the nearest centroid."""
    table, total = torch.from_numpy(np.asarray(centroids)), 0.0
    half = table.square().sum(1) / 2
    for points in torch.from_numpy(matrix).split(4096):
        nearest = torch.addmm(-half, points, table.T).argmax(1)
        total += float((points - table[nearest]).square().sum(1).double().sum())
    return total


def _peak(way: str, file: Path, start: Path, case: Case) -> float:
    """Return the peak resident memory in MiB of a process of its own, libraries included."""
    command = [sys.executable, "-m", "benchmarks.kmeans", "--child", way, str(file), str(start)]
    done = subprocess.run(
        [*command, str(case.k), "2"], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    return float(done.stdout)


def _measure_memory(way: str, file: str, start: str, k: str, iters: str) -> None:
    from patchloom.tokenizers.kmeans import kmeans

    centroids = np.load(start)
    if way == "faiss":
        import faiss

        matrix = np.load(file)
        faiss.Kmeans(matrix.shape[1], int(k), niter=int(iters), max_points_per_centroid=10**9).train(
            matrix, init_centroids=centroids
        )
    elif way != "nothing":
        points = torch.from_numpy(np.load(file)) if way == "ours" else file
        kmeans(points, int(k), iters=int(iters), init=torch.from_numpy(centroids))
    # not getrusage: its maximum is inherited from the process that started this one
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


if __name__ == "__main__":
    main()
