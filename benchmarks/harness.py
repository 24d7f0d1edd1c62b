"""What all benchmarks share: the machine in words, fair alternation, and tables that rewrite themselves in docs/."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any


def machine() -> str:
    """Return one line: processor, cores, accelerator, torch version, date."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
        units = [name for name in ("amx_bf16", "avx512_bf16", "avx2") if name in flags]
        model += f" ({units[0]})" if units else ""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    threads = f"{torch.get_num_threads()} threads"
    return f"{model}, {threads}, {accelerator}, torch {torch.__version__}, {date.today().isoformat()}"


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time the candidates in turn (A B A B …), so that a machine whose speed drifts is fair to all.

    Args:
        candidates: Name to the call that is timed.
        rounds: Counted calls of each.
        warmup: Calls of each that are not counted, first.
        clock: Seconds; `time.process_time` counts the processor's time, which others on the machine do not add to.

    Returns:
        Seconds of every counted call, by name.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return seconds


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def mean_and_deviation(values: Sequence[float], digits: int = 2) -> str:
    """Return `mean ± standard deviation` (n - 1) of the values, as text.

    >>> mean_and_deviation([1.0, 2.0, 3.0])
    '2.00 ± 1.00'
    """
    if len(values) < 2:
        return f"{values[0]:.{digits}f} (one run)"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def rewrite(page: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->` on a docs page.

    Raises:
        ValueError: The page has no such pair of markers.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{page} has no {begin} … {end} to write the result between")
    before, rest = old.split(begin, 1)
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")
