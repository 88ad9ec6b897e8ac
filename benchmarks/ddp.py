"""What a second process is worth: time per update and frames per second with 1 and 2, at equal threads in total.

Usage: python -m benchmarks.ddp [--batch 256 512 1024 2048 4096] [--hidden 256 256] [--env Hopper-v5] [--json FILE]
       python -m benchmarks.ddp --one-device [--accelerator gpu]

Each way of using the machine trains with ``Trainer.fit`` as a run does, in fresh processes, for so many updates after
a burn-in; the ways take turns, several times over. An update is everything in it: TD target through the sampler,
critics, targets, denoiser, optimizers, and what the ranks tell each other.

one         one process with all threads, batch B
ddp         two processes with half of the threads and half of B each; one message per optimizer (trainer.strategy ddp)
reducer     the same with torch's reducer (trainer.strategy ddp_find_unused_parameters_true)
part        one process with half of the threads and half of B, beside a second one like it: what a rank computes,
            without a word to the other. The share of communication is what ddp takes longer.
seeds       two processes with half of the threads and B each that know nothing of each other: two runs of other seeds

With --one-device: ``one`` against one process under ddp, which a run on several machines of one device each has.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.strategies import DDPStrategy

from benchmarks.machine import described, machine
from benchmarks.report import save, spread
from benchmarks.training import quiet_trainer
from qsm_lightning.datamodule import OffPolicyDataModule, datamodule_of
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.tables import markdown

BURN_IN = 10  # updates that are not counted
# way: processes, of a group that trains together, the strategy, and each process's part of threads and batch
WAYS: dict[str, tuple[int, str, int, int]] = {
    "one": (1, "auto", 1, 1),
    "ddp": (2, "ddp", 2, 1),
    "reducer": (2, "ddp_find_unused_parameters_true", 2, 1),
    "part": (2, "", 2, 2),
    "seeds": (2, "", 2, 1),
    "ddp of one": (1, "ddp", 1, 1),
}


class Clock(Callback):
    """Seconds spent in updates, and in everything."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"
        self.updating, self.updates, self.first, self.last = 0.0, 0, 0.0, 0.0
        self.collecting, self._before = 0.0, 0

    def _now(self) -> float:
        if self.gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def aside(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function``, whose time within a batch is not that of updates."""

        def measured() -> Any:
            start = self._now()
            try:
                return function()
            finally:
                self.collecting += self._now() - start

        return measured

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._start, self.collecting = self._now(), 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now, done = self._now(), datamodule_of(trainer).progress.updates
        if done <= BURN_IN:
            self.first = now
        else:
            self.updating += now - self._start - self.collecting
            self.updates += done - self._before
            self.last = now
        self._before = done


def measure(way: str, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: train, and tell the milliseconds per update and the frames per second."""
    processes, strategy, part, share = WAYS[way]
    torch.set_num_threads(max(1, options.threads // part))
    together = processes if strategy else 1
    warm_up = max(options.warm_up, batch)
    data = OffPolicyDataModule(
        options.env,
        total_frames=warm_up + BURN_IN + options.updates,
        init_random_frames=warm_up,
        batch_size=batch // share,
        eval_every_frames=10**9,
        eval_episodes=1,
        eval_selector="sample",
    )
    module = OffPolicyModule(
        data.observation_dim, data.action_dim, partial(QSM, hidden=tuple(options.hidden), T=options.T)
    )
    clock = Clock(options.accelerator)
    data.next_round = clock.aside(data.next_round)  # type: ignore[method-assign]
    data.evaluate = lambda: {"sample": {"return": torch.zeros(1), "length": torch.zeros(1)}}  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(
            folder,
            accelerator=options.accelerator,
            devices=together,
            strategy=DDPStrategy() if strategy == "ddp" else strategy or "auto",
            callbacks=[clock],
        ).fit(module, data)
    return {
        "ms": 1e3 * clock.updating / clock.updates,
        "frames_per_s": clock.updates / (clock.last - clock.first),  # an update a frame, over all ranks
    }


def run(way: str, batch: int, options: argparse.Namespace) -> dict[str, float]:
    """One way once: the slowest of its processes, and the frames of all of them together."""
    processes, strategy, _, _ = WAYS[way]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    world |= {"LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "benchmark"}
    command = [sys.executable, "-m", "benchmarks.ddp", *sys.argv[1:], "--worker", way, "--batch", str(batch)]
    running = []
    for rank in range(processes):
        ranked = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if strategy not in ("", "auto") else {}
        running.append(subprocess.Popen(command, env=os.environ | ranked, stdout=subprocess.PIPE, text=True))
    found = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    frames = [one["frames_per_s"] for one in found]
    return {"ms": max(one["ms"] for one in found), "frames_per_s": sum(frames) if not strategy else min(frames)}


def table(rows: list[dict[str, Any]], ways: list[str], what: str, digits: int) -> str:
    """``ms`` or ``frames_per_s`` of each way in markdown, and what they make of one process's, taken in turn."""
    several = [way for way in ways if way not in ("one", "part")]
    head = ["batch", *ways, *(f"{way} / one" for way in several)]
    lines = []
    for row in rows:
        found = {way: [one[what] for one in row["ways"][way]] for way in ways}
        ratios = [statistics.median(a / b for a, b in zip(found[way], found["one"], strict=True)) for way in several]
        cells = [*(spread(found[way], digits) for way in ways), *(f"{ratio:.2f}" for ratio in ratios)]
        lines.append([f"{row['batch']:,}", *cells])
    return markdown(head, lines)


def communication(rows: list[dict[str, Any]]) -> str:
    """The share of an update under ddp that is not a rank's own computing, by batch."""
    middle = [
        {way: statistics.median(one["ms"] for one in row["ways"][way]) for way in ("part", "ddp")} for row in rows
    ]
    shares = [
        f"{row['batch']:,}: {100 * (1 - m['part'] / m['ddp']):.0f} %" for row, m in zip(rows, middle, strict=True)
    ]
    return f"share of communication by batch: {', '.join(shares)}"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="B, over all ranks")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="widths (default: %(default)s)")
    parser.add_argument("--T", type=int, default=5, help="denoising steps (default: %(default)s)")
    parser.add_argument("--env", default="Hopper-v5", help="environment (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=100, help="updates that count (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=1000, help="frames before (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="in total (all cores)")
    parser.add_argument("--accelerator", default="cpu", help="cpu or gpu (default: %(default)s)")
    parser.add_argument("--one-device", action="store_true", help="one process with and without ddp")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    parser.add_argument("--worker", choices=list(WAYS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure in alternation and print."""
    options = parse()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    if options.worker:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        print(json.dumps(measure(options.worker, options.batch[-1], options)))
        return
    torch.set_num_threads(options.threads)
    ways = ["one", "ddp of one"] if options.one_device else ["one", "ddp", "reducer", "part", "seeds"]
    results: dict[str, Any] = {
        "machine": machine(),
        "options": {name: getattr(options, name) for name in ("batch", "hidden", "T", "env", "updates", "repeats")},
        "rows": [],
    }
    for batch in options.batch:
        measured: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way in ways:
                measured[way].append(run(way, batch, options))
        results["rows"].append({"batch": batch, "ways": measured})
        print(f"batch {batch} is done", file=sys.stderr)
    setting = f"{options.env}, hidden {options.hidden}, T {options.T}, {options.updates} updates x {options.repeats}"
    rows = results["rows"]
    lines = [described(results["machine"]), setting, "", "ms per update, median (least - most)", ""]
    lines += [table(rows, ways, "ms", 1), "", "frames per second", "", table(rows, ways, "frames_per_s", 0)]
    print("\n".join([*lines, *(["", communication(rows)] if "part" in ways else [])]))
    save(options.json, results)


if __name__ == "__main__":
    main()
