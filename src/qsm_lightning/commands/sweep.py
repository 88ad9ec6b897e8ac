"""``qsm-sweep``: runs of ``qsm-fit`` side by side, over settings and seeds; the same command goes on with them."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qsm_lightning import checkpoints, cli, durable, launching, resume, runs
from qsm_lightning.commands.base import Parser, run_command
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import Interrupted, SettingError, TrainingFault, require, require_positive, tell
from qsm_lightning.seeding import check_seed

OWN = (
    *("--name", "--resume", "--ckpt_path", "--seed_everything"),
    *("--trainer.default_root_dir", "--trainer.logger", "--trainer.enable_checkpointing"),
)
POLL = 0.5  # seconds
TRACEBACK = 1  # the status of a process that ends in one
LINE = re.compile(r"^frames (\d+)/(\d+)(?: return (\S+))?.* frames/s (\d+)", re.MULTILINE)

EPILOG = """
Every other option is for qsm-fit, and the same in all runs. Each run has the folder OUT/VARIANT/seed=SEED.
Started again, the same command goes on with runs that were interrupted, and leaves alone those that are complete.

Examples:
  qsm-sweep --config dmc/walker_walk --seeds 0-4 --vary model.loss=qsm,sac,td3 --jobs 2
  qsm-sweep --vary config=hopper,walker2d --vary model.actor_lr=3e-4,1e-4 --seeds 0-2
  qsm-sweep --config hopper --variant qsm= --variant "soft=--model.loss.m_q_slope 0.5" --variant "sac=--model.loss sac"
"""

MOST_SEEDS = 10_000


def main(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-sweep``. See ``qsm-sweep --help``."""
    run_command("qsm-sweep", lambda: run(args))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "qsm-sweep",
        usage="qsm-sweep [--seeds S] [--vary KEY=A,B] [--variant NAME=OPTIONS] [--jobs N] [--out DIR] [qsm-fit's ...]",
        description="Train with varied settings and seeds, several runs at a time.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", default="0", help="such as 0-4 or 0,2,7 (0)")
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="an option of qsm-fit and its values; given again, every combination is run",
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=OPTIONS",
        help="options of qsm-fit under a name, to compare what differs in more than one setting",
    )
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=max(1, cores // 2), help="runs at a time (half the cores)")
    parser.add_argument("--out", type=Path, help="folder of the runs (sweeps/CONFIG)")
    return parser


@dataclass
class Job:
    """One run: where it is, how it is started, whether it has one GPU or chooses devices itself, and how far it is."""

    label: str
    folder: Path
    options: list[str]
    total_frames: int
    one_gpu: bool = True
    state: str = "waiting"
    frames: int = 0
    value: str = ""
    speed: str = ""
    process: subprocess.Popen[Any] | None = field(default=None, repr=False)

    @property
    def log(self) -> Path:
        """What its ``qsm-fit`` prints."""
        return self.folder / "log.txt"

    def checkpoint(self) -> checkpoints.Checkpoint | None:
        """The newest checkpoint that it has saved."""
        found = (folder for version in self.folder.glob("version_*") if (folder := version / runs.CHECKPOINTS).is_dir())
        return max((c for folder in found for c in checkpoints.complete(folder)), key=lambda c: c.order, default=None)

    def go_on(self, settings: dict[str, Any], data: OffPolicyDataModule) -> None:
        """Look whether it was begun, and is complete.

        Raises:
            SettingError: when what is in its folder was begun with other settings.
        """
        newest = self.checkpoint()
        if newest is None:
            return
        try:
            saved, _ = resume.whole(newest, replay=False)
            state = checkpoints.load(saved.state)
            resume.check_settings(saved, state, settings)
            data.check_dataset(state["OffPolicyDataModule"])
        except SettingError as error:
            raise SettingError(f"--out: {error}; or choose another --out") from error
        self.frames, owed = resume.frames_done(state)
        if self.frames >= self.total_frames and not owed:
            self.state = "complete"
            self.look()

    def look(self) -> None:
        """Read from disk how far it is."""
        if self.log.is_file() and (lines := LINE.findall(self.log.read_text(errors="replace"))):
            frames, _, value, self.speed = lines[-1]
            self.frames, self.value = int(frames), next((v for *_, v, _ in reversed(lines) if v), "")

    def end(self) -> str:
        """The state of a run that has ended by itself."""
        newest = self.checkpoint()
        self.frames = newest.order[0] if newest else self.frames
        return "complete" if self.frames >= self.total_frames else "stopped early"

    def line(self) -> str:
        """How far it is, in a line."""
        value = f" return {self.value}" if self.value else ""
        speed = f" frames/s {self.speed}" if self.state == "running" and self.speed else ""
        return f"{self.label}: {self.state} {self.frames}/{self.total_frames}{value}{speed}"


def seeds_of(text: str) -> list[int]:
    """``0-2,5`` -> [0, 1, 2, 5].

    Raises:
        SettingError: for anything else, and for a seed that is there twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", part)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise SettingError(f"--seeds is {text!r}: write 0-4 or 0,2,7")
        require(
            int(match[2] or match[1]) - int(match[1]) < MOST_SEEDS,
            f"--seeds is {text!r}: a range has at most {MOST_SEEDS} seeds; give fewer",
        )
        check_seed(int(match[2] or match[1]), "--seeds")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    require(len(set(found)) == len(found), f"--seeds is {text!r}: a seed is there twice; give each once")
    return found


def variants_of(vary: list[str], variants: list[str]) -> dict[str, list[str]]:
    """Every combination of variants and varied settings: its name, such as ``loss=sac,T=5``, and its options.

    A variant's come last, so that its configuration is read after a task's.

    Raises:
        SettingError: for what is not KEY=A,B or NAME=OPTIONS, and for two of the same name.
    """
    choices: list[list[tuple[str, list[str]]]] = []
    for text in variants:
        name, equals, options = text.partition("=")
        require(equals and name, f"--variant is {text!r}: write NAME=OPTIONS, such as 'sac=--model.loss sac'")
        require(not name.startswith("."), f"--variant is {text!r}: a name begins with no point; choose another")
        try:
            words = shlex.split(options)
        except ValueError as error:
            raise SettingError(f"--variant is {text!r}: {error}; mend the quotes") from error
        choices[:1] = [[*(choices[0] if choices else []), (name, words)]]
    for text in vary:
        key, equals, values = text.partition("=")
        key = key.removeprefix("--")
        listed = re.findall(r"(?:\[[^]]*\]|[^,\[])+", values)  # a list in brackets is one value
        whole = ",".join(listed) == values and all(value.count("[") == value.count("]") < 2 for value in listed)
        require(
            equals and key and listed and whole,
            f"--vary is {text!r}: write KEY=A,B, such as model.loss=qsm,sac, a list in one pair of brackets, and null "
            "for no value",
        )
        short = key.rpartition(".")[2]
        choices.append([(f"{short}={value}", [f"--{key}={value}"]) for value in listed])
    names: dict[str, list[str]] = {}
    here = len(choices) - len(vary)  # variants are one choice, the first
    for combination in itertools.product(*choices):
        name = ",".join(name for name, _ in combination).replace("/", "-")
        require(name not in names, f"two variants have the name {name!r}: give each value once")
        on_top, varied = combination[:here], combination[here:]  # what is varied may be the task
        names[name] = [option for _, options in (*varied, *on_top) for option in options]
    return names


def _config_first(options: list[str]) -> list[str]:
    """The options with configurations before what is set on top of them."""
    configs: list[str] = []
    others: list[str] = []
    words = iter(options)
    for word in words:
        if word in ("-c", "--config"):
            configs += [f"--config={next(words, '')}"]
        else:
            (configs if word.startswith("--config=") else others).append(word)
    return configs + others


def _default_out(options: list[str]) -> Path:
    configs = [option.partition("=")[2] for option in _config_first(options) if option.startswith("--config=")]
    return Path("sweeps") / (Path(configs[0]).stem if configs else "sweep")


def plan(args: list[str] | None = None) -> tuple[list[Job], int, Path]:
    """The runs that a command line asks for, all of their settings checked; how many are run at a time; their folder.

    Raises:
        SettingError: for settings of which one run or all are wrong.
    """
    options, shared = _parser().parse_known_args(args)
    require_positive("--", jobs=options.jobs)
    seeds = seeds_of(options.seeds)
    out = options.out or _default_out(shared)
    durable.check_writable(out / "log.txt", "--out")
    jobs: dict[int, list[Job]] = {seed: [] for seed in seeds}
    named: dict[str, str] = {}  # by resolved settings
    for name, varied in variants_of(options.vary, options.variant).items():
        for option in (word.partition("=")[0] for word in (*shared, *varied)):
            require(option not in OWN, f"{option} is the same in all runs of qsm-sweep, or set by it: leave it out")
        given = [*_config_first([*shared, *varied]), f"--trainer.default_root_dir={out}"]
        built = cli.build(given)
        built.datamodule.env.close()
        settings = built.parser.dump(built.config, skip_none=False)
        require(
            (same := named.setdefault(settings, name)) == name,
            f"{same!r} and {name!r} are the same settings, of which the last counts where one is given twice: leave "
            "one out of --vary and --variant",
        )
        trainer = built.config["trainer"]
        for own in ("logger", "enable_checkpointing"):  # what a configuration may have as well
            require(trainer[own] in (None, True), f"trainer.{own} is set by qsm-sweep: leave it out of --config")
        for seed in seeds:
            label = "/".join(filter(None, (name, f"seed={seed}")))
            each = [*given, f"--name={label}", f"--seed_everything={seed}"]
            durable.check_writable(out / label / "log.txt", "--out")
            one_gpu = trainer["devices"] == "auto"
            job = Job(label, out / label, each, built.datamodule.total_frames, one_gpu)
            job.go_on(built.identity() | {"seed_everything": seed}, built.datamodule)
            if job.state != "complete":
                newest = job.checkpoint()
                built.buffer_report(newest.run if newest else job.folder)
            jobs[seed].append(job)
    return [job for of_a_seed in jobs.values() for job in of_a_seed], options.jobs, out


def command(job: Job) -> list[str]:
    """The ``qsm-fit`` that begins a run, or goes on with it."""
    checkpoint = job.checkpoint()
    options = job.options
    if checkpoint is not None:  # with the settings of this command, which may ask for more frames
        options = [*(o for o in options if o != "--trust"), f"--ckpt_path={checkpoint.path}", "--trust"]
    return [sys.executable, "-m", "qsm_lightning", *options]


class Sweep:
    """Jobs, ``at_once`` of them at a time, each a process; an interruption is passed on to all, which save.

    Where there are GPUs, each job has one of them, in turn, unless its ``trainer.devices`` says otherwise.

    Args:
        jobs: in the order in which they are begun.
        at_once: how many are run at a time.
    """

    def __init__(self, jobs: list[Job], at_once: int) -> None:
        self.jobs = jobs
        self.at_once = at_once
        self.signum: int | None = None
        self.gpus: SimpleQueue[dict[str, str]] = SimpleQueue()
        for _, gpu in zip(range(at_once), itertools.cycle(launching.gpus())):
            self.gpus.put({"CUDA_VISIBLE_DEVICES": gpu})

    def run(self) -> None:
        """Run all.

        Raises:
            Interrupted: by SIGINT, SIGTERM or SIGHUP, once every run has saved its state.
            TrainingFault: when runs have failed, at the end of the others.
        """
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # as nohup has it
                signal.signal(signum, self._interrupt)
        with ThreadPoolExecutor(self.at_once) as pool, View(self.jobs) as show:
            futures = [pool.submit(self._train, job) for job in self.jobs]
            try:
                while not all(future.done() for future in futures):
                    time.sleep(POLL)
                    show()
                show()
            except BrokenPipeError:  # nobody reads any more what it prints
                self._interrupt(signal.SIGTERM, None)
                raise
        for future in futures:
            future.result()
        if self.signum is not None:
            print("the same command goes on with what is not complete", flush=True)
            raise Interrupted(self.signum)
        failed = [job for job in self.jobs if job.state.startswith("failed")]
        if failed:
            raise TrainingFault(f"{len(failed)} of {len(self.jobs)} runs failed; see {failed[0].log}")
        if any(job.state == "stopped early" for job in self.jobs):
            print("the same command, with a greater limit, goes on with what stopped early", flush=True)

    def _interrupt(self, signum: int, frame: Any) -> None:
        self.signum = signum
        for job in self.jobs:
            if job.process is not None and job.process.poll() is None:
                job.process.send_signal(signal.SIGTERM)

    @contextmanager
    def _gpu(self, job: Job) -> Iterator[dict[str, str]]:
        """The variable by which a job sees one GPU, no other job's while there are enough."""
        if not job.one_gpu or self.gpus.empty():
            yield {}
            return
        gpu = self.gpus.get()
        try:
            yield gpu
        finally:
            self.gpus.put(gpu)

    def _train(self, job: Job) -> None:
        if self.signum is not None or job.state == "complete":
            return
        with self._gpu(job) as gpu:
            self._run(job, gpu)

    def _run(self, job: Job, gpu: dict[str, str]) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // self.at_once))
        env = {"OMP_NUM_THREADS": threads, **os.environ, **gpu, launching.SWEEP: str(os.getpid())}
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            with job.log.open("a") as log:
                if not runs.hold(log):  # which its qsm-fit holds as well, beyond the end of a sweep
                    job.state = "failed (another qsm-sweep trains it: wait for its end)"
                    return
                start = log.tell()
                job.process = subprocess.Popen(
                    command(job), env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
                )
        except OSError as error:
            job.state = f"failed ({error})"
            return
        job.state = "running"
        if self.signum is not None:
            job.process.send_signal(signal.SIGTERM)
        status = job.process.wait()
        job.look()
        job.state = job.end() if status == 0 else _why(job, start, status, self.signum)


def _why(job: Job, start: int, status: int, signum: int | None) -> str:
    """The state of a run that has ended early."""
    if signum is not None:
        return "interrupted"
    if status < 0:
        return f"failed (ended by signal {-status}, {signal.strsignal(-status)})"
    said = job.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    sentences = [line for line in said if status != TRACEBACK and line.startswith("qsm-fit: ")]
    return f"failed ({(sentences or said or [f'status {status}'])[-1].removeprefix('qsm-fit: ')})"


class View:
    """A table that is kept up to date in a terminal; elsewhere a line whenever a run has something new."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.said: dict[str, tuple[str, str]] = {}
        self.console = Console()
        self.live = Live(self._table(), console=self.console, auto_refresh=False) if self.console.is_terminal else None

    def __enter__(self) -> Any:
        if self.live:
            self.live.start()
        return self.show

    def __exit__(self, *_: Any) -> None:
        if self.live:
            self.live.stop()

    def show(self) -> None:
        """Show how far the runs are."""
        for job in self.jobs:
            if job.state == "running":
                job.look()
        if self.live:
            self.live.update(self._table(), refresh=True)
            return
        for job in self._changed():
            tell(job.line())

    def _changed(self) -> Iterator[Job]:
        for job in self.jobs:
            now = (job.state, job.value)
            if job.state != "waiting" and self.said.get(job.label) != now:
                self.said[job.label] = now
                yield job

    def _table(self) -> Table:
        """All runs; where the terminal has too few lines, how many are complete or waiting, and the others."""
        table = Table("run", "", "frames", "return", "frames/s", box=None)
        jobs, counts = self.jobs, Counter[str]()
        if len(jobs) + 2 > self.console.height:
            counts = Counter(job.state for job in jobs if job.state in ("complete", "waiting"))
            jobs = [job for job in jobs if job.state not in counts]
        for job in jobs:
            cells = (job.label, job.state, f"{job.frames}/{job.total_frames}", job.value, job.speed)
            table.add_row(*map(Text, cells))  # a label or a reason may have brackets, which are markup in a string
        for state, count in counts.items():
            table.add_row(Text(f"{count} runs"), Text(state))
        return table


def run(args: list[str] | None = None) -> None:
    """Parse, run all, and print what to type next."""
    jobs, at_once, out = plan(args)
    print(f"qsm-sweep: {len(jobs)} runs in {out}, {at_once} at a time", flush=True)
    Sweep(jobs, at_once).run()
    print(f"next: {shlex.join(['qsm-report', str(out), '--out', 'report'])}")
