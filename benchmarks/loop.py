"""Frames per second of the whole training loop, and where the time goes.

Usage: python -m benchmarks.loop [--case 1:1 1:0.25 1:4 4:0.25 16:0.25 64:0.25] [--env Hopper-v5] [--json FILE]

A case is the number of environments and of updates per frame. Each way runs in a process of its own; they take turns,
several times over. Frames count from the end of a burn-in, in which code is compiled, to the end.

qsm         qsm-fit as a user runs it: Lightning, TorchRL's collector and buffer, logging, progress
bare        the same compiled update and policy in a loop of raw tensors, without Lightning or TorchRL
eager       the eager port (benchmarks/eager_port.py) in that loop
env         the environments alone, with one action
sac, td3    stable-baselines3 with the same hidden widths and batch size, where it is installed
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pytorch_lightning import Callback, Trainer
from tensordict import TensorDict
from torch import Tensor

from benchmarks.eager_port import Port
from benchmarks.machine import described, machine
from benchmarks.report import save, spread
from benchmarks.update import optimizers
from qsm_lightning.callbacks import FrameProgress, TrainingMetrics
from qsm_lightning.cli import fit
from qsm_lightning.compiled import CompiledUpdate, compile_acting
from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.envs import EnvpoolTask, GuardedGymWrapper, make_env, make_gym
from qsm_lightning.losses import QSM
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.policy import Policy
from qsm_lightning.replay import make_replay_buffer
from qsm_lightning.tables import markdown

WAYS = ["qsm", "bare", "eager", "env", "sac", "td3"]
WARM_UP = 512  # frames before the first update
PARTS: dict[str, list[tuple[type, str]]] = {
    "env": [(GuardedGymWrapper, "step_array"), (GuardedGymWrapper, "reset_array"), (EnvpoolTask, "_step")],
    "acting": [(Policy, "checked_action")],
    "buffer": [(type(make_replay_buffer(1)), "extend"), (type(make_replay_buffer(1)), "sample")],
    "update": [(OffPolicyModule, "_update"), (OffPolicyModule, "_update_compiled")],
    "logging": [(TrainingMetrics, "on_train_batch_end"), (FrameProgress, "on_train_batch_end")],
}


class Clock:
    """Frames and seconds since the burn-in, and seconds of each part of the loop.

    Args:
        burn_in: frames that are not counted.
        frames: frames that are.
    """

    def __init__(self, burn_in: int, frames: int) -> None:
        self.burn_in, self.end = burn_in, burn_in + frames
        self.parts: defaultdict[str, float] = defaultdict(float)
        self._first: tuple[int, float] | None = None
        self.frames, self.seconds = 0, 0.0
        self.at_end: dict[str, float] = {}
        self.first_update: float | None = None  # seconds from the start of the process

    def tick(self, frames: int) -> None:
        """So many frames are done."""
        if self._first is None:
            if frames >= self.burn_in:
                self._first = (frames, time.perf_counter())
                self.parts.clear()
        elif self.frames == 0 and frames >= self.end:
            self.frames, self.seconds = frames - self._first[0], time.perf_counter() - self._first[1]
            self.at_end = dict(self.parts)

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, whose time counts for ``part``."""

        @wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.parts[part] += time.perf_counter() - start

        return measured

    def result(self) -> dict[str, Any]:
        """Frames per second, and milliseconds per frame of each part."""
        return {
            "frames_per_s": self.frames / self.seconds,
            "ms": {part: 1e3 * seconds / self.frames for part, seconds in self.at_end.items()},
            "first_update_s": self.first_update,
        }


class Ticking(Callback):
    """Lets a :class:`Clock` see the frames of ``qsm-fit``."""

    clock: Clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        progress = datamodule_of(trainer).progress
        if self.clock.first_update is None and progress.updates > 0:
            self.clock.first_update = time.time() - psutil.Process().create_time()
        self.clock.tick(progress.frames)


def run_qsm(options: argparse.Namespace, clock: Clock) -> None:
    """The command, as a user gives it, with clocks at its parts."""
    importlib.import_module("benchmarks.loop").Ticking.clock = clock  # under the name that the command imports
    for part, methods in PARTS.items():
        for owner, name in methods:
            setattr(owner, name, clock.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            [
                *(f"--data.env={options.env}", f"--data.num_envs={options.num_envs}", f"--data.utd={options.utd}"),
                *(f"--data.init_random_frames={WARM_UP}", f"--data.total_frames={clock.end + options.num_envs}"),
                *("--data.eval_every_frames=1000000000", "--data.eval_episodes=1", "--data.eval_selector=sample"),
                *(f"--model.loss.hidden={options.hidden}", "--model.compile=true", "--trainer.devices=1"),
                *(f"--trainer.accelerator={options.accelerator}", "--data.storage=device"),
                *(f"--trainer.default_root_dir={folder}", "--trainer.callbacks+=benchmarks.loop.Ticking"),
            ]
        )


class RawEnvs:
    """Environments stepped one after the other, arrays in and out."""

    def __init__(self, name: str, count: int) -> None:
        self.copies = [make_gym(name) for _ in range(count)]
        self.observation = np.stack([env.reset(seed=i)[0] for i, env in enumerate(self.copies)])

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Next observations [N, O], rewards [N, 1], terminated [N, 1]; episodes that end begin anew."""
        following = np.empty_like(self.observation)
        rewards, flags = np.empty((len(actions), 1), np.float32), np.empty((len(actions), 1), np.bool_)
        for i, env in enumerate(self.copies):
            following[i], rewards[i], flags[i], truncated, _ = env.step(actions[i])
            self.observation[i] = env.reset()[0] if flags[i] or truncated else following[i]
        return following, rewards, flags


def run_bare(options: argparse.Namespace, clock: Clock, port: bool = False) -> None:
    """Act, step, store, sample, update on raw tensors."""
    envs = RawEnvs(options.env, options.num_envs)
    observation_dim, action_dim = envs.observation.shape[1], envs.copies[0].action_space.shape[0]  # type: ignore[index]
    if port:
        plain = Port(observation_dim, action_dim, list(options.hidden), 5)
        act: Callable[[Tensor], Tensor] = plain.act
        update: Callable[[Any], Any] = plain.update
    else:
        loss = QSM(observation_dim, action_dim, hidden=tuple(options.hidden))
        policy = loss.exploration_policy()
        compile_acting(policy)
        act = policy.act
        update = CompiledUpdate(loss, optimizers(loss), lambda due: loss.update_targets())
    size = clock.end + 2 * options.num_envs
    store = [torch.empty(size, width) for width in (observation_dim, action_dim, 1)] + [
        torch.empty(size, 1, dtype=torch.bool)
    ]
    store.append(torch.empty(size, observation_dim))
    act, step, update = clock.timed("acting", act), clock.timed("env", envs.step), clock.timed("update", update)
    frames, updates = 0, 0
    while frames < clock.end:
        seen = torch.tensor(envs.observation)
        with torch.no_grad():
            action = torch.rand(len(seen), action_dim) * 2 - 1 if frames < WARM_UP else act(seen)
        following, rewards, terminated = step(action.numpy())
        new = (seen, action, torch.from_numpy(rewards), torch.from_numpy(terminated), torch.from_numpy(following))
        for column, values in zip(store, new, strict=True):
            column[frames : frames + len(seen)] = values
        frames += len(seen)
        while updates < int(options.utd * (frames - WARM_UP)):
            chosen = torch.randint(frames, (256,))
            observation, action, reward, flag, after = batch = tuple(column.index_select(0, chosen) for column in store)
            if not port:
                after = TensorDict({"observation": after, "reward": reward, "terminated": flag, "done": flag}, [256])
                batch = TensorDict({"observation": observation, "action": action, "next": after}, [256])
            update(batch)
            updates += 1
        clock.tick(frames)


def run_env(options: argparse.Namespace, clock: Clock) -> None:
    """The environments with one action."""
    if options.env.startswith("envpool:"):
        env = make_env(options.env, options.num_envs)
        state = env.rand_action(env.reset())
        for i in range(clock.end):
            state = env.step_and_maybe_reset(state)[1].set("action", state["action"])
            clock.tick((i + 1) * options.num_envs)
            if clock.frames:
                return
        return
    envs = RawEnvs(options.env, options.num_envs)
    actions = np.stack([env.action_space.sample() for env in envs.copies])
    for i in range(clock.end):
        envs.step(actions)
        clock.tick((i + 1) * options.num_envs)
        if clock.frames:
            return


def run_sb3(options: argparse.Namespace, clock: Clock) -> None:
    """SAC or TD3 of stable-baselines3."""
    from stable_baselines3 import SAC, TD3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Tick(BaseCallback):
        def _on_step(self) -> bool:
            clock.tick(self.num_timesteps)
            return True

    per_step = options.utd * options.num_envs
    model = {"sac": SAC, "td3": TD3}[options.worker](
        "MlpPolicy",
        make_vec_env(options.env, options.num_envs),
        policy_kwargs={"net_arch": list(options.hidden)},
        batch_size=256,
        learning_starts=WARM_UP,
        train_freq=max(1, round(1 / per_step)),
        gradient_steps=max(1, round(per_step)),
        device="cpu",
    )
    model.learn(clock.end + 2 * options.num_envs, callback=Tick())


def work(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: one way."""
    torch.set_num_threads(options.threads)
    fewest = max(1, round(options.frames / max(1.0, options.utd)))
    clock = Clock(WARM_UP + max(64, 4 * options.num_envs), fewest * (4 if options.utd < 1 else 1))
    runs: dict[str, Callable[[], None]] = {
        "qsm": lambda: run_qsm(options, clock),
        "bare": lambda: run_bare(options, clock),
        "eager": lambda: run_bare(options, clock, port=True),
        "env": lambda: run_env(options, clock),
    }
    runs.get(options.worker, lambda: run_sb3(options, clock))()
    return clock.result()


def table(rows: list[dict[str, Any]], ways: list[str]) -> str:
    """Frames per second of each way, and what qsm makes of bare's and eager's."""
    lines = []
    for row in rows:
        speeds = {way: [one["frames_per_s"] for one in row["ways"][way]] for way in ways if way in row["ways"]}
        cells = [spread(speeds[way], 0) if way in speeds else "" for way in ways]
        cells += [
            f"{statistics.median(a / b for a, b in zip(speeds[top], speeds[bottom], strict=True)):.2f}"
            if top in speeds and bottom in speeds
            else ""
            for top, bottom in (("bare", "qsm"), ("qsm", "eager"))
        ]
        lines.append([row["env"], str(row["num_envs"]), f"{row['utd']:g}", *cells])
    return markdown(["environment", "num_envs", "utd", *ways, "time of qsm / bare", "frames/s of qsm / eager"], lines)


def shares(rows: list[dict[str, Any]]) -> str:
    """Milliseconds per frame of each part of qsm and bare; the rest glues them, and in bare is the buffer."""
    lines = []
    for row in rows:
        for way in ("qsm", "bare"):
            if way in row["ways"]:
                whole = statistics.median(1e3 / one["frames_per_s"] for one in row["ways"][way])
                parts = {
                    part: statistics.median(one["ms"].get(part, 0.0) for one in row["ways"][way]) for part in PARTS
                }
                parts["the rest"] = whole - sum(parts.values())
                cells = [f"{ms:.2f} ({100 * ms / whole:.0f} %)" for ms in parts.values()]
                lines.append([row["env"], str(row["num_envs"]), f"{row['utd']:g}", way, f"{whole:.2f}", *cells])
    return markdown(["environment", "num_envs", "utd", "way", "ms per frame", *PARTS, "the rest"], lines)


def start_up(rows: list[dict[str, Any]]) -> str:
    """Seconds from the start of the process to the end of the first update."""
    seconds = [one["first_update_s"] for row in rows for one in row["ways"]["qsm"]]
    return f"first update of qsm after {min(seconds):.1f} to {max(seconds):.1f} s: compiled code is kept"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case",
        nargs="+",
        default=["1:1", "1:0.25", "1:4", "4:0.25", "16:0.25", "64:0.25"],
        help="environments:updates per frame (default: %(default)s)",
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="what to measure (default: all)")
    parser.add_argument("--env", default="Hopper-v5", help="environment (default: %(default)s)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="widths (default: %(default)s)")
    parser.add_argument("--accelerator", default="cpu", choices=["cpu", "gpu"], help="of qsm (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=1000, help="frames that count at utd 1 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads (all cores)")
    parser.add_argument("--json", type=Path, help="also write all measurements to this file")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.num_envs, options.utd = (float(part) for part in options.case[-1].split(":"))
    options.num_envs = int(options.num_envs)
    return options


def main() -> None:
    """Measure in alternation and print."""
    options = parse()
    if options.worker:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        print(json.dumps(work(options)))
        return
    torch.set_num_threads(options.threads)
    ways = [way for way in options.ways if way not in ("sac", "td3") or importlib.util.find_spec("stable_baselines3")]
    if options.env.startswith("envpool:"):
        ways = [way for way in ways if way in ("qsm", "env")]
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    for case in options.case:
        num_envs, utd = case.split(":")
        row: dict[str, Any] = {"env": options.env, "num_envs": int(num_envs), "utd": float(utd), "ways": {}}
        for _ in range(options.repeats):
            for way in ways:
                command = [sys.executable, "-m", "benchmarks.loop", *sys.argv[1:], "--worker", way, "--case", case]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                row["ways"].setdefault(way, []).append(json.loads(done.stdout.splitlines()[-1]))
        results["rows"].append(row)
        print(f"{case} is done", file=sys.stderr)
    setting = f"hidden {options.hidden}, batch 256, T 5; frames per second: median (least - most)"
    parts = ["", "by part", "", shares(results["rows"]), "", start_up(results["rows"])] if "qsm" in ways else []
    print("\n".join([described(results["machine"]), setting, "", table(results["rows"], ways), *parts]))
    save(options.json, results)


if __name__ == "__main__":
    main()
