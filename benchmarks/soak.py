"""A long run under fire: stopped and killed at random every minute or so, compared with one left in peace.

Usage: python -m benchmarks.soak [--frames 200000] [--seconds 30 90] [--folder DIR] [--json FILE] [-- SETTINGS]

Both runs train Pendulum-v1 side by side, each on one thread. The first is left alone. The second gets SIGTERM or
SIGKILL, at random, after a random number of seconds, and is resumed with ``qsm-fit --resume``. At the end everything
their last checkpoints hold and every value they logged is compared, and the memory they took is printed over time.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
from tests.compare import curves, differences, rows, state

from benchmarks.machine import described, machine
from benchmarks.report import save
from qsm_lightning import checkpoints
from qsm_lightning.tables import markdown

SETTINGS = [
    *("--model.loss.hidden=[64,64]", "--data.utd=0.25", "--data.buffer_size=50000"),
    *("--data.eval_every_frames=5000", "--checkpoint.every_frames=1000"),
]


class Life:
    """One process of a run, with its memory every few seconds."""

    def __init__(self, folder: Path, args: list[str]) -> None:
        self.log = (folder / "log.txt").open("ab")
        self.process = psutil.Popen(
            [Path(sys.executable).with_name("qsm-fit"), *args],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self.started = time.monotonic()

    def memory(self) -> tuple[float, float]:
        """Seconds since it started, and MiB it takes."""
        return time.monotonic() - self.started, self.process.memory_info().rss / 2**20


def newest(run: Path) -> int:
    """The frame of a run's newest checkpoint."""
    found = checkpoints.complete(run / "checkpoints")
    return found[-1].order[0] if found else 0


def soak(folder: Path, settings: list[str], seconds: tuple[float, float], seed: int = 0) -> dict[str, Any]:
    """Run both to their ends; returns what happened."""
    moments = random.Random(seed)
    for name in ("peace", "fire"):
        (folder / name).mkdir(parents=True)
    peace = Life(folder / "peace", settings)
    runs = folder / "fire" / "runs" / "Pendulum-v1"
    memory: dict[str, list[tuple[float, float]]] = {"peace": [], "fire": []}
    events: list[dict[str, Any]] = []
    status = None
    while status != 0:
        run = max(runs.glob("version_*"), default=runs / "version_0")  # one killed before its first checkpoint is left
        life = Life(folder / "fire", ["--resume", str(run)] if newest(run) else settings)
        end = time.monotonic() + moments.uniform(*seconds)
        signum = None
        while life.process.poll() is None:
            time.sleep(2 if signum is None else 0.05)
            for name, watched in (("peace", peace), ("fire", life)):
                if watched.process.poll() is None:
                    memory[name].append(watched.memory())
            if signum is None and time.monotonic() > end and life.process.poll() is None:
                signum = moments.choice((signal.SIGTERM, signal.SIGKILL))
                life.process.send_signal(signum)
                sent = time.monotonic()
        status = life.process.returncode
        if signum is None:
            assert status == 0, f"it ended with status {status}: see {folder}/fire/log.txt"
            break
        took = time.monotonic() - sent
        assert status in (143, -9, 0), f"it ended with status {status}: see {folder}/fire/log.txt"
        run = max(runs.glob("version_*"), default=run)
        events.append({"signal": signum.name, "status": status, "frames": newest(run), "seconds_to_end": took})
        mib = {name: f"{samples[-1][1]:.0f}" for name, samples in memory.items() if samples}
        print(
            f"{signum.name}: status {status} after {took:.1f} s, checkpoint at {newest(run)} frames, MiB {mib}",
            flush=True,
        )
    assert peace.process.wait() == 0, f"see {folder}/peace/log.txt"
    return {"events": events, "memory": memory, **compare(folder / "peace/runs/Pendulum-v1/version_0", run)}


def compare(one: Path, two: Path) -> dict[str, Any]:
    """What of two runs differs: their last states, rows and curves."""
    return {
        "different_state": differences(state(one), state(two)),
        "rows_equal": rows(one) == rows(two),
        "curves_equal": curves(one) == curves(two),
        "rows": len(rows(one)),
    }


def settled(memory: list[tuple[float, float]]) -> list[float]:
    """Memory of processes older than 20 s, in the order of time."""
    return [mib for age, mib in memory if age > 20]


def report(result: dict[str, Any], settings: list[str]) -> str:
    """The figures, as Markdown."""
    ended = []
    for name, count in Counter(event["signal"] for event in result["events"]).items():
        events = [event for event in result["events"] if event["signal"] == name]
        seconds = [event["seconds_to_end"] for event in events]
        codes = sorted({event["status"] for event in events})
        ended.append([name, count, codes, f"{statistics.median(seconds):.1f}, {max(seconds):.1f}"])
    memory = []
    for name, samples in result["memory"].items():
        mib = settled(samples) or [float("nan")]
        tenth = max(1, len(mib) // 10)
        middle = mib[len(mib) // 2 - tenth // 2 :][:tenth]
        parts = [statistics.median(part) for part in (mib[:tenth], middle, mib[-tenth:])]
        memory.append([name, *(f"{part:.0f}" for part in (*parts, max(mib)))])
    different = result["different_state"]
    lines = [
        described(machine()),
        f"settings: {' '.join(settings)}",
        "",
        markdown(["signal", "times", "exit status", "seconds to the end, median and most"], ended),
        "",
        f"state: {'equal, bit by bit' if not different else different[:10]}; "
        f"rows of metrics.csv ({result['rows']}): {'equal' if result['rows_equal'] else 'different'}; "
        f"TensorBoard: {'equal' if result['curves_equal'] else 'different'}",
        "",
        markdown(["memory in MiB", "first tenth", "middle", "last tenth", "most"], memory),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=200_000)
    parser.add_argument("--seconds", type=float, nargs=2, default=(30, 90), help="between two signals")
    parser.add_argument("--folder", type=Path, help="where the runs go; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write everything here as well")
    parser.add_argument("settings", nargs="*", default=SETTINGS, help="of qsm-fit, on top of its pendulum.yaml")
    options = parser.parse_args()
    settings = ["--config=pendulum", f"--data.total_frames={options.frames}", *options.settings]
    folder = options.folder.resolve() if options.folder else Path(tempfile.mkdtemp(prefix="soak-"))
    result = soak(folder, settings, options.seconds)
    print(report(result, settings))
    save(options.json, result)
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
