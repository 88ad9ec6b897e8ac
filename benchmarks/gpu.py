"""What a GPU makes of a gradient update, and of the whole loop.

Usage: python -m benchmarks.gpu [--settings 512/256/fp32 1024/8192/bf16 ...] [--minutes 8] [--device cuda] [--json FILE]

An update is everything in it, as in benchmarks/update.py, on batches that are on the device. In one process, taking
turns:

eager       as in a run with model.compile false
compiled    as one compiled function, whose kernels are started one by one
graphed     the same function as a CUDA graph: as in a run with model.compile true

against two floors: the products of matrices in an update at the rate that torch.mm reaches with large matrices in the
same precision, and its kernels at the time that an empty one takes in a graph. Then frames per second of qsm-fit, by
benchmarks/loop.py. Half as many settings as there are cores are compiled side by side, then measured one after the
other, then the next ones, until most of the time is used: what is left out is said. With --device cpu, which has no
graphs, the benchmark itself can be tried.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.machine import described, machine
from benchmarks.report import quartiles, save, told
from benchmarks.update import ACTION, Products, compiled_update, optimizers, plain_update, replay_batch
from qsm_lightning.compiled import CompiledUpdate
from qsm_lightning.gpu import Captured
from qsm_lightning.losses import QSM
from qsm_lightning.tables import markdown

PRECISIONS = ["fp32", "tf32", "bf16"]
SETTINGS = [(h, b, name) for b, name, h in product([256, 8192, 2048], PRECISIONS, [512, 256, 1024])]
CASES = ["1:1", "16:0.25", "256:0.0625"]  # of benchmarks/loop.py
OBSERVATION = 11
LARGE = 8192  # matrices that reach the rate
COMPILING_S, SETTING_S = 75.0, 10.0  # settings are begun if there is so much left for all at once, and for each
CASE_S = 75.0  # kept for each case of the loop


def setting(text: str) -> tuple[int, int, str]:
    """Width, batch and precision from the command line."""
    hidden, batch, name = text.split("/")
    if name not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {PRECISIONS}")
    return int(hidden), int(batch), name


def wait(device: torch.device) -> None:
    """Until what was started is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_each(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Of so many calls in a row."""
    wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    wait(device)
    return (time.perf_counter() - start) / calls


@contextlib.contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """As trainer.precision bf16-mixed, or 32-true with or without TF32 in products of matrices."""
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16", cache_enabled=False):  # as Lightning
        yield
    torch.set_float32_matmul_precision("highest")


def matrix_rate(name: str, device: torch.device, size: int) -> float:
    """FLOP/s of torch.mm on large square matrices."""
    left, right = torch.randn(2, size, size, device=device).to(torch.bfloat16 if name == "bf16" else torch.float32)
    with precision(name, device):
        seconds = min(seconds_each(lambda: torch.mm(left, right), 5, device) for _ in range(4))
    return 2 * size**3 / seconds


def kernel_seconds(device: torch.device, count: int = 1000) -> float:
    """What a kernel with nothing to do takes in a graph."""
    one, graph = torch.zeros(1, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            one.add_(1)
    return min(seconds_each(graph.replay, 10, device) for _ in range(5)) / count


def kernels(call: Callable[[], Any], device: torch.device) -> dict[str, dict[str, tuple[int, float]]]:
    """The kernels that a call starts, how often, and microseconds: cuBLAS's products, Triton's loops, the rest."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        wait(device)
    found: dict[str, dict[str, tuple[int, float]]] = {"products": {}, "loops": {}, "the rest": {}}
    for event in recorded.events() or ():
        if event.device_type == DeviceType.CUDA:
            multiplies = any(word in event.name.lower() for word in ("gemm", "nvjet", "splitk", "cublas"))
            kind = "loops" if event.name.startswith("triton_") else "products" if multiplies else "the rest"
            name = event.name[:60]  # of what may be several hundred letters
            count, time_us = found[kind].get(name, (0, 0.0))
            found[kind][name] = (count + 1, time_us + event.device_time_total)
    return found


def compile_setting(hidden: int, batch: int, name: str, T: int, device: torch.device) -> float:
    """In a process of its own: leave the code of a setting on disk; returns the seconds it took."""
    loss = QSM(OBSERVATION, ACTION, hidden=(hidden, hidden), T=T).to(device)
    update = compiled_update(loss, replay_batch(batch, OBSERVATION).to(device))
    start = time.perf_counter()
    with precision(name, device):
        update()
    wait(device)
    return time.perf_counter() - start


def compile_all(settings: list[tuple[int, int, str]], T: int, device: torch.device) -> list[float]:
    """Seconds that each setting took to compile, all at once."""
    with ProcessPoolExecutor(len(settings), multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(partial(compile_setting, T=T, device=device), *zip(*settings, strict=True)))


def measure(hidden: int, batch: int, name: str, T: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """One setting: milliseconds an update takes in each way, and what is in it."""
    frames = replay_batch(batch, OBSERVATION)
    with Products() as products:
        plain_update(QSM(OBSERVATION, ACTION, hidden=(hidden, hidden), T=T), frames)()
    frames = frames.to(device)
    losses = [QSM(OBSERVATION, ACTION, hidden=(hidden, hidden), T=T).to(device) for _ in range(2)]
    fast = CompiledUpdate(losses[1], optimizers(losses[1]), lambda due: losses[1].update_targets())
    with precision(name, device):
        ways: dict[str, Callable[[], Any]] = {"eager": plain_update(losses[0], frames)}
        start = time.perf_counter()
        for _ in range(3):
            fast(frames)
        wait(device)
        first_calls_s = time.perf_counter() - start
        ((due, made),) = fast._compiled.items()
        forms = {"compiled": made.function, "graphed": made} if isinstance(made, Captured) else {"compiled": made}

        def as_form(form: Any) -> None:
            fast._compiled[due] = form
            fast(frames)

        ways |= {way: partial(as_form, form) for way, form in forms.items()}
        ms: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, call in ways.items():
                once = seconds_each(call, 3, device)
                calls = max(3, min(300, round(0.1 / once)))
                ms[way].append(1e3 * seconds_each(call, calls, device))
        started = kernels(ways["graphed"], device) if "graphed" in ways else {}
    return {
        "setting": {"hidden": hidden, "batch": batch, "precision": name, "T": T},
        "flops": products.flops(),
        "kernels": started,
        "first_calls_s": first_calls_s,
        "update_ms": {way: quartiles(values) for way, values in ms.items()},
    }


def table(rows: list[dict[str, Any]], rates: dict[str, float], kernel_s: float) -> str:
    """Milliseconds and updates per second, against the floors."""
    head = ["hidden", "batch", "precision", "T", "eager, ms", "compiled, ms", "graphed, ms", "updates/s"]
    head += ["times eager", "of the matrix rate", "kernels", "their floor, ms", "products, ms", "loops, ms"]
    cells = []
    for row in rows:
        ms = row["update_ms"]
        best = ms.get("graphed", ms["compiled"])[0]
        cells.append(
            [
                *map(str, row["setting"].values()),
                *(told(ms[way], 3) if way in ms else "" for way in ("eager", "compiled", "graphed")),
                f"{1e3 / best:,.0f}",
                f"{ms['eager'][0] / best:.1f}",
                f"{row['flops'] / (best / 1e3) / rates[row['setting']['precision']]:.0%}",
                str(count := sum(count for of_kind in row["kernels"].values() for count, _ in of_kind.values())),
                f"{1e3 * count * kernel_s:.3f}",
                *(
                    f"{sum(time_us for _, time_us in row['kernels'].get(kind, {}).values()) / 1e3:.3f}"
                    for kind in ("products", "loops")
                ),
            ]
        )
    return markdown(head, cells)


def frames_per_second(gpu: bool, case: str) -> dict[str, Any]:
    """Of qsm-fit and of the environments alone, by benchmarks/loop.py; empty where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "loop.json"
        command = [sys.executable, "-m", "benchmarks.loop", "--ways", "qsm", "env", "--repeats", "1"]
        command += ["--accelerator", "gpu" if gpu else "cpu", "--json", str(file), "--case", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            return {}
        print(done.stdout.split("\n\n")[1], flush=True)
        return json.loads(file.read_text())["rows"][0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--settings", nargs="+", type=setting, default=SETTINGS, help="width/batch/precision (default: 27 of them)"
    )
    parser.add_argument("--T", type=int, default=5, help="denoising steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns, at least 2 (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="time for all (default: %(default)s)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the benchmark (default: %(default)s)")
    parser.add_argument("--no-loop", action="store_true", help="updates alone")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    if gpu and not torch.cuda.is_available():
        parser.error("there is no CUDA device: --device cpu tries the benchmark without one")
    end = time.monotonic() + 60 * options.minutes
    end_of_updates = end - (0 if options.no_loop else CASE_S * len(CASES))
    size = LARGE if gpu else 512
    rates = {name: matrix_rate(name, device, size) for name in PRECISIONS}
    results: dict[str, Any] = {
        "machine": machine(),
        "matrix_flops_per_s": rates,
        "kernel_s": kernel_seconds(device) if gpu else 0.0,
        "compiling_s": [],
        "rows": [],
        "left_out": [],
    }
    at_once = max(1, len(os.sched_getaffinity(0)) // 2)
    for first in range(0, len(options.settings), at_once):
        settings = options.settings[first : first + at_once]
        if time.monotonic() + COMPILING_S + SETTING_S * len(settings) > end_of_updates:
            results["left_out"] += settings
            continue
        results["compiling_s"] += compile_all(settings, options.T, device)
        for hidden, batch, name in settings:
            results["rows"].append(measure(hidden, batch, name, options.T, device, options.rounds))
            gc.collect()  # its graph, before the next is captured
            save(options.json, results)
            print(f"({hidden}, {hidden}), batch {batch}, {name} is done", file=sys.stderr)
    print(f"{described(results['machine'])}\n\nms per update: median (quartiles)\n")
    print(table(results["rows"], rates, results["kernel_s"]))
    if took := results["compiling_s"]:
        print(f"\ncompiling a setting, several at once: {min(took):.0f} to {max(took):.0f} s")
    print("matrix rate: " + ", ".join(f"{name} {rate / 1e12:,.1f} TFLOP/s" for name, rate in rates.items()))
    if results["left_out"]:
        print("no time was left for " + ", ".join(f"{h}/{b}/{name}" for h, b, name in results["left_out"]))
    results["loop"] = []
    for case in [] if options.no_loop else CASES:
        if time.monotonic() + CASE_S < end:
            print(f"\nframes per second, environments:updates per frame {case}, hidden (256, 256)\n")
            results["loop"].append(frames_per_second(gpu, case))
    save(options.json, results)


if __name__ == "__main__":
    main()
