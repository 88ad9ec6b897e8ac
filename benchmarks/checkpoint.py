"""What a checkpoint costs: time and bytes by the frames that are new, not by the replay buffer's size.

Usage: python -m benchmarks.checkpoint [--frames 10000 100000 1000000] [--folder FOLDER] [--json FILE]

Buffers of several fills get the same number of new frames again and again. Each time a checkpoint is written as a run
writes it (the frames that are new, a state, the manifest; then old ones are removed), and beside it ``torch.save``
writes the buffer's whole content to one file; both are synced to disk. Then two processes of their own
save the fullest buffer for the first time and load it again, and report the most memory they held. All buffers are in
memory at once: the defaults need 8 GB of it and 8 GB of disk. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer

from benchmarks.machine import described, machine
from benchmarks.report import save, spread
from qsm_lightning import checkpoints, durable
from qsm_lightning.replay import FRAME_KEYS, Chunk, ReplayArchive, frame_bytes, make_replay_buffer
from qsm_lightning.tables import markdown

FILL_FRAMES = 20_000  # random frames that are written again and again to fill a buffer
MANY_FRAMES, MANY_REPEATS = 100_000, 2  # above this many frames the whole content is written so many times only
GOAL = 1.2  # the most memory while saving or loading, in buffers
MB = 1e6
STATE = os.urandom(1_000_000)  # stands for networks, optimizers and the rest


# Buffers.


def random_frames(count: int, observation_dim: int, action_dim: int) -> TensorDict:
    """Frames as a collector writes them; only their sizes matter."""
    flag = torch.zeros(count, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": torch.randn(count, observation_dim),
            "action": torch.randn(count, action_dim),
            "next": {
                "observation": torch.randn(count, observation_dim),
                "reward": torch.randn(count, 1),
                "terminated": flag,
                "done": flag.clone(),
            },
        },
        [count],
    )


def add(buffer: ReplayBuffer, frames: TensorDict, count: int) -> None:
    """Extend the buffer by ``count`` frames, reusing those given."""
    while count:
        batch = frames[: min(count, len(frames))]
        buffer.extend(batch)
        count -= len(batch)


# Time and bytes.


@dataclass
class Row:
    """The measurements of one fill: milliseconds and bytes of every repeat."""

    fill: int  # before the first repeat; each adds frames, and the whole content is that of the first so many
    checkpoint_ms: list[float] = field(default_factory=list)
    checkpoint_bytes: list[int] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    whole_bytes: list[int] = field(default_factory=list)


def milliseconds(work: Callable[[], Any]) -> float:
    """How long ``work`` takes, begun when nothing waits to be written to disk."""
    os.sync()
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def write_checkpoint(buffer: ReplayBuffer, archive: ReplayArchive) -> None:
    """All of it, as a run does; the newest two stay."""
    folder = archive.folder.parent
    chunks = archive.save(buffer)
    with checkpoints.staging(folder) as stage:
        (stage / checkpoints.STATE).write_bytes(STATE)
        checkpoints.publish(stage, buffer.write_count, None, {chunk.file: chunk.record for chunk in chunks})
    checkpoints.thin_out(folder, 2)


def measure_checkpoint(row: Row, buffer: ReplayBuffer, archive: ReplayArchive) -> None:
    """Write one; the bytes are those of the files that were not there before."""
    before = set(archive.folder.parent.rglob("*"))
    row.checkpoint_ms.append(milliseconds(lambda: write_checkpoint(buffer, archive)))
    new = set(archive.folder.parent.rglob("*")) - before
    row.checkpoint_bytes.append(sum(path.stat().st_size for path in new if path.is_file()))


def measure_whole(row: Row, buffer: ReplayBuffer, path: Path) -> None:
    """Write ``fill`` frames to one file; copying them out of the storage beforehand is not counted."""
    frames = buffer[: row.fill].select(*FRAME_KEYS).clone()
    content = dict(frames.flatten_keys(".").items())

    def write() -> None:
        torch.save(content, path)
        durable.sync(path)

    row.whole_ms.append(milliseconds(write))
    row.whole_bytes.append(path.stat().st_size)
    path.unlink()


def measure_times(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Go through the fills back and forth, so that what slows the machine for a while slows no fill alone."""
    frames = random_frames(FILL_FRAMES, options.observation_dim, options.action_dim)
    rows, buffers, archives = [], [], []
    for fill in options.frames:
        rows.append(Row(fill))
        buffers.append(make_replay_buffer(max(options.frames)))
        archives.append(ReplayArchive(folder / str(fill) / checkpoints.REPLAY))
        for first in range(0, fill, options.every):  # as many files as a run of that length has
            add(buffers[-1], frames, min(options.every, fill - first))
            archives[-1].save(buffers[-1])
        write_checkpoint(buffers[-1], archives[-1])
    for repeat in range(options.repeats):
        order = list(zip(rows, buffers, archives, strict=True))
        for row, buffer, archive in order if repeat % 2 == 0 else reversed(order):
            add(buffer, frames, options.every)
            measure_checkpoint(row, buffer, archive)
            if row.fill <= MANY_FRAMES or repeat < MANY_REPEATS:
                measure_whole(row, buffer, folder / "whole.pt")
    return rows


# Memory.


def resident_bytes() -> int:
    """Memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def sampled_memory(every_seconds: float = 0.002) -> Iterator[list[int]]:
    """Look at this process's memory again and again; the list holds the most that was seen."""
    most, stop = [resident_bytes()], threading.Event()

    def look() -> None:
        while not stop.wait(every_seconds):
            most[0] = max(most[0], resident_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def measure_memory(options: argparse.Namespace) -> dict[str, float]:
    """Save a full buffer for the first time, or load what that wrote, in this process."""
    count, index = max(options.frames), options.memory_folder / "chunks.json"
    archive = ReplayArchive(options.memory_folder / "replay")
    libraries = resident_bytes()
    buffer = make_replay_buffer(count)
    if options.memory == "save":
        add(buffer, random_frames(FILL_FRAMES, options.observation_dim, options.action_dim), count)
    else:
        archive.chunks = [Chunk(**chunk) for chunk in json.loads(index.read_text())]
    os.sync()
    with sampled_memory() as most:
        start = time.perf_counter()
        if options.memory == "save":
            archive.save(buffer)
        else:
            archive.load(buffer, count)
        seconds = time.perf_counter() - start
    if options.memory == "save":
        index.write_text(json.dumps([asdict(chunk) for chunk in archive.chunks]))
    size = count * frame_bytes(options.observation_dim, options.action_dim)
    return {
        "frames": count,
        "seconds": seconds,
        "buffer_bytes": size,
        "libraries_bytes": libraries,
        "peak_bytes": most[0],
        "ratio": (most[0] - libraries) / size,
    }


def memory_of_process(options: argparse.Namespace, work: str, folder: Path) -> dict[str, float]:
    """:func:`measure_memory` in a fresh process, whose allocator has nothing left over to reuse."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", "--memory", work, "--memory-folder", str(folder)]
    command += ["--frames", str(max(options.frames))]
    command += ["--observation-dim", str(options.observation_dim), "--action-dim", str(options.action_dim)]
    root = Path(__file__).resolve().parent.parent
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=root).stdout)


# Report.


def file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [mount for mount in mounts if folder.resolve().is_relative_to(mount[0])]
    return max(reversed(holding), key=lambda mount: len(mount[0]))[1]  # of equals the one mounted last


def table(rows: list[Row], new_bytes: int) -> str:
    """The measurements in markdown."""
    head = ["fill", "MB new"]
    for way in ("checkpoint", "torch.save"):
        head += [f"{way} ms (median, min - max)", f"{way} MB written"]
    return markdown(
        [*head, "torch.save ms / checkpoint ms"],
        (
            (
                f"{row.fill:,}",
                f"{new_bytes / MB:.1f}",
                spread(row.checkpoint_ms, 0),
                f"{statistics.median(row.checkpoint_bytes) / MB:.1f}",
                spread(row.whole_ms, 0),
                f"{statistics.median(row.whole_bytes) / MB:,.1f}",
                f"{statistics.median(row.whole_ms) / statistics.median(row.checkpoint_ms):,.1f}",
            )
            for row in rows
        ),
    )


def report(results: dict[str, Any], rows: list[Row]) -> str:
    """What is printed: where, what, the table, and the memory."""
    where, options = results["environment"], results["options"]
    size = frame_bytes(options["observation_dim"], options["action_dim"])
    lines = [
        f"{described(where)}; {where['file_system']}",
        "",
        f"{options['every']:,} new frames of {size:,} bytes before each of {options['repeats']} checkpoints, "
        f"which hold {len(STATE) / MB:.0f} MB besides; "
        f"room for {max(options['frames']):,} frames in every buffer; the whole content of more than {MANY_FRAMES:,} "
        f"frames is written {min(MANY_REPEATS, options['repeats'])} times; 1 MB is 10^6 bytes",
        "",
        table(rows, options["every"] * size),
        "",
    ]
    for work, memory in results["memory"].items():
        lines.append(
            f"{work} of {memory['frames']:,} frames in a process of its own: {memory['seconds']:.1f} s, at most "
            f"{memory['ratio']:.3f} x the buffer's {memory['buffer_bytes'] / MB:,.0f} MB, buffer included "
            f"(goal: {GOAL}); {memory['peak_bytes'] / memory['buffer_bytes']:.3f} x with the "
            f"{memory['libraries_bytes'] / MB:,.0f} MB that the process holds before it has a buffer"
        )
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fills = [10_000, 30_000, 100_000, 300_000, 1_000_000]
    parser.add_argument("--frames", type=int, nargs="+", default=fills, help="fills; the largest is the capacity")
    parser.add_argument("--observation-dim", type=int, default=348, help="of an observation (default: Humanoid-v5)")
    parser.add_argument("--action-dim", type=int, default=17, help="of an action (default: Humanoid-v5)")
    parser.add_argument("--every", type=int, default=5_000, help="new frames before each save (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="saves per fill (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to write, in a temporary folder that is removed")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    parser.add_argument("--memory", choices=["save", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--memory-folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and leave nothing behind."""
    options = parse()
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    if options.memory:
        print(json.dumps(measure_memory(options)))
        return
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "options": {name: getattr(options, name) for name in ("frames", "observation_dim", "action_dim")}
        | {"every": options.every, "repeats": options.repeats}
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        results["environment"] = machine() | {"file_system": file_system(Path(temporary))}
        results["memory"] = {work: memory_of_process(options, work, Path(temporary)) for work in ("save", "load")}
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        rows = measure_times(options, Path(temporary))
    results["rows"] = [asdict(row) for row in rows]
    print(report(results, rows))
    save(options.json, results)


if __name__ == "__main__":
    main()
