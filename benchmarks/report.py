"""Measured in turn, told in tables: what the benchmarks share."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of each call of each way: ``calls`` of one, then of the next, ``rounds`` times over, one unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            call()  # whatever the one before left in the caches
            for _ in range(calls):
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return seconds


def first_calls(ways: Mapping[str, Callable[[], Any]], calls: int = 10) -> dict[str, float]:
    """Seconds of the first calls of each way, compiling included; none of them is measured again."""
    seconds = {}
    for name, call in ways.items():
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds[name] = time.perf_counter() - start
    return seconds


def spread(values: Sequence[float], digits: int) -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} - {max(values):,.{digits}f})"


def quartiles(values: Sequence[float]) -> list[float]:
    """Median and both quartiles: for many short measurements, whose largest is the machine's business."""
    low, median, high = statistics.quantiles(values, n=4)
    return [median, low, high]


def told(found: Sequence[float], digits: int) -> str:
    """:func:`quartiles` in a table."""
    median, low, high = found
    return f"{median:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def save(path: Path | None, results: dict[str, Any]) -> None:
    """Write results as JSON, if a file was named."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
