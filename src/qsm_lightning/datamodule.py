"""The data side of training: collect k frames -> extend the buffer -> sample the updates these frames are worth."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from pytorch_lightning import LightningDataModule, Trainer
from tensordict import TensorDict, TensorDictBase
from torchrl._utils import seed_generator
from torchrl.envs import EnvBase

from qsm_lightning import datasets, durable, launching, runs, sharding
from qsm_lightning.collect import GymCollector, make_collector
from qsm_lightning.compiled import compile_acting
from qsm_lightning.continuous import TIME_STEP
from qsm_lightning.distributed import Ranks
from qsm_lightning.env_state import NoStateError
from qsm_lightning.envs import MOST_COPIES, make_env
from qsm_lightning.errors import (
    EnvironmentFault,
    Interrupted,
    TrainingFault,
    one_line,
    require,
    require_at_most,
    require_not_negative,
    require_package,
    require_positive,
)
from qsm_lightning.evaluation import run_episodes
from qsm_lightning.experience import Experience
from qsm_lightning.losses import OffPolicyLoss
from qsm_lightning.losses.base import non_finite
from qsm_lightning.plain import generators_state, load_generators_state
from qsm_lightning.policy import Policy, check_samples
from qsm_lightning.precision import full_precision_on
from qsm_lightning.progress import Progress, RecentExperience, exact_fraction
from qsm_lightning.replay import FrameBuffer, Storage
from qsm_lightning.seeding import Purpose, derive_seed, global_seed
from qsm_lightning.stopping import Stopping
from qsm_lightning.watch import Watch
from qsm_lightning.workers import Workers

log = logging.getLogger(__name__)
T = TypeVar("T")

FRAMES_PER_BATCH = 10  # of a training batch, where rounds have fewer: Lightning's work for one is then a few per cent
SELECTORS = ("sample", "best_of_n")


def datamodule_of(trainer: Trainer) -> OffPolicyDataModule:
    """The trainer's datamodule; with another kind this package's module and callbacks cannot work."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, OffPolicyDataModule), f"needs an OffPolicyDataModule, not {type(data).__name__}"
    return data


class SizedStream:
    """An endless iterable with a length, which Lightning neither prefetches nor copies."""

    def __init__(self, length: int, make: Callable[[], Any]) -> None:
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield self.make()


class OffPolicyDataModule(LightningDataModule):
    """Environment, collector, replay buffer and evaluation episodes.

    It goes in rounds: a chunk of new frames, and then the updates that these are worth, a list of minibatches
    [batch_size]. A training batch is an iterator over a few rounds, as Lightning's work for a batch costs as much as a
    frame. Frames are the clock: an epoch is one evaluation period, and training stops at the first round that reaches
    ``total_frames``.

    With several processes (ranks) each has environments, random streams and a buffer of its own. Frames, updates and
    sizes count over all of them, so that a configuration means the same on any number; ``num_envs`` and
    ``frames_per_batch`` alone are each rank's. All ranks do the same at the same time: whether to stop, to save or to
    give up is agreed on where none of them can be ahead (:mod:`qsm_lightning.stopping`).

    Args:
        env: a gymnasium id (Hopper-v5), dmc:domain/task, or envpool:id; continuous: before one of the first two has
            frames tell their time step, and takes options, such as continuous:Pendulum-v1?time_scale=1/4.
        num_envs: copies of the environment on each rank, stepped together; with workers, in each of them.
        frames_per_batch: frames that each rank collects in a round, a multiple of its environments; one of each by
            default.
        total_frames: frames to train for.
        init_random_frames: frames of uniform random actions before the first update, at least batch_size.
        batch_size: frames per gradient update, over all ranks: each samples an equal part.
        buffer_size: capacity of the replay buffer in frames, over all ranks.
        storage: where the buffer lives: memory, memmap (files mapped into memory), or the device that trains, from
            whose memory minibatches then come.
        storage_dir: folder in which memmap makes its own, removed at the end; the run's folder by default.
        save_buffer: save the replay buffer with every checkpoint; without it a resumed run has to refill the buffer.
        utd: gradient updates per frame; may be a fraction.
        eval_every_frames: frames between evaluations (an epoch), rounded up to whole rounds.
        eval_episodes: episodes of each evaluation, from the same starts every time.
        eval_selector: evaluate one sample per step, the best_of_n samples by the smaller critic, or both; with both,
            eval/return is sample's.
        eval_candidates: n of best_of_n.
        env_processes: give each environment a process of its own.
        env_timeout: seconds after which an environment in a process of its own counts as hanging.
        env_restarts: how often failed environments are built anew on each rank, dropping the episodes under way,
            before the run stops.
        rank_timeout: seconds after which several ranks of which none gets on count as hanging, and the run ends.
        collector: where the training environments are: local in this process, or with workers in processes of this
            machine or, by ray, on those of a cluster.
        collector_workers: workers of each rank, unless local.
        collector_max_staleness: gradient updates that weights may be old when the frames they made arrive. From the
            updates of one chunk, the default, workers collect while the learner updates; below they take turns.
        dataset: transitions to learn from beside those collected: minari:NAME, an .npz or .h5 file in D4RL's layout, or
            the folder of a run with a saved buffer.
        offline_frames: the first frames of the run, which are not collected: for each, the updates it is worth are done
            on the dataset alone. There is no warm-up then.
        offline_share: share of the dataset in each minibatch, once there are as many other frames as that leaves.
        rounds_per_batch: most rounds in a training batch, after which Lightning calls the callbacks; by default as many
            as have 10 frames on a rank. The run is the same whatever it is. Batches also end where an evaluation or a
            row of metrics is due.

    Raises:
        SettingError: for a value out of range or an environment that cannot be used.
    """

    def __init__(
        self,
        env: str = "Pendulum-v1",
        num_envs: int = 1,
        frames_per_batch: int | None = None,
        total_frames: int = 1_000_000,
        init_random_frames: int = 10_000,
        batch_size: int = 256,
        buffer_size: int = 1_000_000,
        storage: Storage = "memory",
        storage_dir: str | None = None,
        save_buffer: bool = True,
        utd: float = 1.0,
        eval_every_frames: int = 5_000,
        eval_episodes: int = 10,
        eval_selector: Literal["sample", "best_of_n", "both"] = "both",
        eval_candidates: int = 32,
        env_processes: bool = False,
        env_timeout: float = 60.0,
        env_restarts: int = 0,
        rank_timeout: float = 45.0,
        collector: Literal["local", "processes", "ray"] = "local",
        collector_workers: int = 2,
        collector_max_staleness: int | None = None,
        dataset: str | None = None,
        offline_frames: int = 0,
        offline_share: float = 0.5,
        rounds_per_batch: int | None = None,
    ) -> None:
        super().__init__()
        require_positive(
            "data.",
            num_envs=num_envs,
            total_frames=total_frames,
            batch_size=batch_size,
            buffer_size=buffer_size,
            utd=utd,
            eval_every_frames=eval_every_frames,
            eval_episodes=eval_episodes,
            env_timeout=env_timeout,
            rank_timeout=rank_timeout,
            collector_workers=collector_workers,
            rounds_per_batch=rounds_per_batch,
        )
        require_not_negative("data.", env_restarts=env_restarts, collector_max_staleness=collector_max_staleness)
        require_at_most(
            MOST_COPIES, "data.", num_envs=num_envs, eval_episodes=eval_episodes, collector_workers=collector_workers
        )
        check_samples(eval_candidates, "data.eval_candidates")
        envs, envs_named = num_envs, f"data.num_envs ({num_envs})"
        if collector != "local":
            envs *= collector_workers
            envs_named = f"data.num_envs * data.collector_workers ({num_envs} * {collector_workers})"
        self.frames_per_batch = frames_per_batch or envs
        require(
            frames_per_batch is None or (frames_per_batch > 0 and frames_per_batch % envs == 0),
            f"data.frames_per_batch is {frames_per_batch}: it must be a multiple of {envs_named}, "
            f"such as {max(1, round((frames_per_batch or 0) / envs)) * envs}",
        )
        self.warm_up = init_random_frames if offline_frames == 0 else 0
        self._check_offline(dataset, offline_frames, offline_share, total_frames, collector)
        require(
            init_random_frames >= batch_size or offline_frames > 0,
            f"data.batch_size is {batch_size}: it must not exceed the warm-up, data.init_random_frames "
            f"({init_random_frames})",
        )
        require(
            total_frames > self.warm_up,
            f"data.total_frames is {total_frames}: nothing would be learned, as the warm-up, data.init_random_frames, "
            f"takes {init_random_frames}; give a greater number",
        )
        require(
            buffer_size >= batch_size,
            f"data.buffer_size is {buffer_size}: it must be at least data.batch_size ({batch_size})",
        )
        require(
            collector == "local" or not env_processes,
            f"data.env_processes is true: with data.collector {collector!r} workers have the environments; drop it",
        )
        if collector == "ray":
            require_package("ray", "ray", "data.collector is 'ray'")
        self.save_hyperparameters()
        self.hparams.pop("_instantiator", None)
        self.env_name = env
        self.num_envs = num_envs
        self.total_frames = total_frames
        self.init_random_frames = init_random_frames
        self.batch_size = batch_size
        self.buffer_size = buffer_size
        self.storage = storage
        self.storage_dir = storage_dir
        self.save_buffer = save_buffer
        self.utd = utd
        self.eval_every_frames = eval_every_frames
        self.eval_episodes = eval_episodes
        self.eval_selectors = SELECTORS if eval_selector == "both" else (eval_selector,)
        self.eval_candidates = eval_candidates
        self.env_restarts = env_restarts
        self.offline_frames = offline_frames
        self.offline_share = offline_share
        self.rank_timeout = max(rank_timeout, env_timeout + 10 if env_processes else 0)  # theirs comes first
        self.env_timeout = env_timeout
        self.collector_kind = collector
        self.collector_workers = collector_workers
        self.collector_max_staleness = collector_max_staleness
        self._rounds_per_batch = rounds_per_batch or max(1, FRAMES_PER_BATCH // self.frames_per_batch)
        self._ends: set[int] = set()
        self._make_env = partial(make_env, env, processes=env_processes, timeout=env_timeout)
        self.env = self._make_env(num_envs)
        self.observation_dim = self.env.observation_spec["observation"].shape[-1]
        self.action_dim = self.env.action_spec.shape[-1]
        self.timed = TIME_STEP in self.env.observation_spec
        sizes = self.observation_dim, self.action_dim
        self._dataset = datasets.load(dataset, *sizes, self.timed, env) if dataset is not None else None
        self._fingerprint = None if self._dataset is None else datasets.fingerprint(self._dataset)
        self.progress = Progress()
        self.recent = RecentExperience()
        self.ranks = Ranks()
        self.stopping = Stopping(self.ranks)
        self._watch: Watch | None = None
        self._eval_env: EnvBase | None = None
        self._mapped: Path | None = None
        self.started = False  # from then on there is a state to save
        self.collector: GymCollector | Workers
        self._chunks: Iterator[TensorDictBase] | None = None
        self._owed: list[TensorDictBase] | None = None
        self._env_broken = False
        self._env_new = False
        self._generators: dict[str, Any] | None = None

    @staticmethod
    def _check_offline(dataset: str | None, frames: int, share: float, total_frames: int, collector: str) -> None:
        require(
            0 <= frames <= total_frames,
            f"data.offline_frames is {frames}: it must be between 0 and data.total_frames ({total_frames})",
        )
        require(dataset != "", "data.dataset is '': name a file, a run's folder or minari:NAME, or null for none")
        require(
            frames == 0 or dataset is not None,
            f"data.offline_frames is {frames}: there is nothing to learn from; give data.dataset as well",
        )
        require(
            frames == 0 or collector == "local",
            f"data.offline_frames is {frames}: workers would collect meanwhile; set data.collector to local",
        )
        require(0 <= share <= 1, f"data.offline_share is {share}: it must be between 0 and 1")

    # What Lightning asks for.

    def setup(self, stage: str) -> None:
        """Make an empty buffer."""
        assert self.trainer is not None
        if stage != "fit":
            return
        self.check_ranks(self.trainer.world_size)
        self.check_loss(self._loss)
        self.ranks = Ranks(self.trainer.global_rank, self.trainer.world_size)
        self.stopping.ranks = self.ranks
        self.run = runs.agreed_folder(self.trainer, self.ranks)
        chosen = set(self.ranks.gather(str(self.trainer.ckpt_path or "")))
        require(len(chosen) == 1, f"the processes chose different checkpoints ({', '.join(chosen)}): name one of them")
        if self.ranks.count > 1:
            launched = launching.take_over_children(self.trainer)
            self._watch = Watch(self.ranks, self.rank_timeout, launched, lambda: runs.and_now_of(self.run))
        # An epoch lasts until the next evaluation, wherever between two a run goes on: its length is asked for anew.
        self.trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if self.storage == "memmap":
            self._mapped = self._empty_folder()
        self.experience = Experience(
            self.ranks,
            self.buffer_size,
            partial(self._seed, Purpose.SAMPLER),
            copies=self.num_envs * (1 if self.collector_kind == "local" else self.collector_workers),
            window=self._loss.window,
            offline_share=self.offline_share,
            save_frames=self.save_buffer,
            folder=self._mapped,
            device=self.trainer.strategy.root_device if self.storage == "device" else "cpu",
        )
        if self._dataset is not None:
            self.experience.add_dataset(
                self._dataset, self._seed(Purpose.OFFLINE_SAMPLER), str(self.hparams["dataset"])
            )
            self._dataset = None

    def check_ranks(self, count: int) -> None:
        """Raise :class:`SettingError` unless ``count`` processes can share the settings."""
        require(
            self.batch_size % count == 0,
            f"data.batch_size is {self.batch_size}: it counts over all {count} processes, which sample equal parts; "
            f"give a multiple of {count}, such as {math.ceil(self.batch_size / count) * count}",
        )
        require(
            self._dataset is None or len(self._dataset) >= count,
            f"data.dataset has {0 if self._dataset is None else len(self._dataset)} transitions: each of {count} "
            "processes needs one",
        )

    def check_loss(self, loss: OffPolicyLoss) -> None:
        """Raise :class:`SettingError` unless ``loss`` has the policy that is to be evaluated, and suits the env."""
        if not self.selectors_of(loss):
            loss.check_selector(self.eval_selectors[0], "data.eval_selector")
        loss.check_env(self.env)

    def check_dataset(self, state_dict: dict[str, Any]) -> None:
        """Raise :class:`SettingError` unless the saved run learned from the same dataset, or from none as this one."""
        require(
            state_dict["ranks"][0].get("dataset") == self._fingerprint,
            f"data.dataset is {self.hparams['dataset']!r}: the checkpoint's run learned from another or from none; "
            "give what it was begun with",
        )

    def start(self) -> None:
        """Begin to collect, with the random streams of a new run or the saved ones: the last thing before training."""
        if not self.started:
            self._begin()
        if self._generators is None:
            torch.manual_seed(self._seed(Purpose.NOISE))
        else:
            load_generators_state(self._generators)
        try:
            self.collector.env_state()
        except NoStateError as reason:
            self._say(
                "%s cannot give its state (%s): if this run is resumed, the episodes under way begin anew, "
                "and all else goes on exactly",
                self.env_name,
                reason,
            )

    def _seed(self, purpose: Purpose, *path: int) -> int:
        progress = self.progress
        later = (progress.frames, progress.env_restarts) if progress.frames or progress.env_restarts else ()
        return derive_seed(global_seed(), self.ranks.rank, purpose, *later, *path)

    def _begin(self) -> None:
        """Have environments that collect, on all ranks."""
        self.stopping.together(lambda: self.surviving(self._start_env, self._rebuild_env))
        self.started = True

    def _start_env(self) -> None:
        """Seed the environments, made anew after a fault, and collect from them."""
        if self.collector_kind != "local":
            self._start_workers()
            return
        if self._env_new:
            self.env = self._build(self.num_envs)
        self.env.set_seed(self._seed(Purpose.TRAIN_ENV))
        policy = self._loss.exploration_policy()
        trainer = cast(Trainer, self.trainer)
        if isinstance(policy, Policy) and self._module.compiles(trainer, self):
            compile_acting(policy, trainer.strategy.root_device)
        collector = make_collector(self.env, policy, self.frames_per_batch, self.ranks.share(self.warm_up))
        collector._frames = self.progress.frames // self.ranks.count
        self.collector, self._chunks, self._env_new = collector, iter(collector), False

    def _start_workers(self) -> None:
        """Collect by workers; the environment made here only told its dimensions."""
        _close(self.env)
        updates_per_chunk = math.ceil(exact_fraction(self.utd) * self.frames_per_batch * self.ranks.count)
        staleness = self.collector_max_staleness
        workers = Workers(
            cast(Any, self.collector_kind),
            partial(self._make_env, self.num_envs),
            [(self._seed(Purpose.TRAIN_ENV, w), self._seed(Purpose.NOISE, w)) for w in range(self.collector_workers)],
            self._loss.exploration_policy(),
            frames_per_batch=self.frames_per_batch,
            init_random_frames=max(0, self.ranks.share(self.warm_up - self.progress.frames)),
            max_staleness=updates_per_chunk if staleness is None else staleness,
            updates_per_chunk=updates_per_chunk,
            updates=lambda: self.progress.updates,
            timeout=self.env_timeout,
        )
        self.collector, self._chunks, self._env_new = workers, workers, False

    def _empty_folder(self) -> Path:
        """A folder for the mapped files, the same for every process that goes on with the run."""
        folder = runs.mapped_folder(self.run, self.storage_dir, self.ranks.rank)
        shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
        folder.mkdir(parents=True)
        return folder

    def train_dataloader(self) -> SizedStream:
        """Training batches; their number is what is left until the next evaluation, or to the end."""
        done, owed = self.rounds, self._owed is not None
        left = -done % self._period
        if left == 0 and not owed:
            left = self._period
        to_end = math.ceil((self.total_frames - self.progress.frames) / self._round)
        last = done + min(left, max(0, to_end))
        blocks = range(done + (not owed), last + 1, 2**20)  # a period may be very long
        ends = (self._end_batch(np.arange(first, min(first + 2**20, last + 1))) for first in blocks)
        return SizedStream(sum(int(np.count_nonzero(block)) for block in ends), self.next_batch)

    def val_dataloader(self) -> SizedStream:
        """One batch: the evaluated episodes of each selector."""
        return SizedStream(1, self.evaluate)

    # Data flow.

    @property
    def buffer(self) -> FrameBuffer:
        """The replay buffer of this rank."""
        return self.experience.buffer

    @property
    def _loss(self) -> OffPolicyLoss:
        return cast(OffPolicyLoss, self._module.loss)

    @property
    def _module(self) -> Any:
        assert self.trainer is not None
        return self.trainer.lightning_module

    @property
    def _round(self) -> int:
        """Frames of a round, over all ranks."""
        return self.frames_per_batch * self.ranks.count

    @property
    def rounds(self) -> int:
        """Rounds of collecting and updating so far."""
        return self.progress.frames // self._round

    @property
    def _period(self) -> int:
        """Rounds of an evaluation period."""
        return math.ceil(self.eval_every_frames / self._round)

    def end_batches_every(self, frames: int) -> None:
        """Have a training batch end with the round that reaches any multiple of ``frames``: a callback looks then."""
        self._ends.add(frames)

    def _end_batch(self, rounds: T) -> T:
        """Whether a training batch ends with the n-th round of the run; ``rounds`` is n, or an array of them."""
        rest = self.progress.frames % self._round  # of another number of ranks, from which the run went on
        frames: Any = rounds * self._round + rest  # type: ignore[operator]
        ends = rounds % self._period % self._rounds_per_batch == 0  # type: ignore[operator]
        for every in self._ends:
            ends = ends | (frames % every < self._round)
        return ends | (frames >= self.total_frames)

    @property
    def evaluation_owed(self) -> bool:
        """Whether an evaluation belongs at the present frame and has not been done."""
        period = self._period * self._round
        due = self.rounds % self._period == 0 and self.progress.evaluated // period < self.progress.frames // period
        ends = self.progress.frames >= self.total_frames
        return (due or ends) and self.progress.evaluated < self.progress.frames

    @property
    def epochs(self) -> int:
        """Evaluation periods that are over, the evaluation at their end included."""
        done, further = divmod(self.rounds, self._period)
        return done - (further == 0 and self.evaluation_owed)

    def next_batch(self) -> Iterator[list[TensorDictBase]]:
        """The rounds of a training batch, each made when it is asked for, after the updates of the one before."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        while True:
            self.check_stop()
            counted = self._owed == []  # then an evaluation alone is owed: the batch has ended before
            with full_precision_on(device.type):
                updates = self.next_round()
            if self.progress.frames >= self.total_frames:
                self.trainer.should_stop = True
            yield [self._on_device(minibatch, device) for minibatch in updates]
            if self._end_batch(self.rounds):
                self.progress.batches += not counted
                return

    def next_round(self) -> list[TensorDictBase]:
        """Collect a chunk, store it, and sample the updates it is worth: each [batch_size], none in the warm-up."""
        if self._owed is None:
            return self._collect()
        updates, self._owed = self._owed, None
        return updates

    def _on_device(self, minibatch: TensorDictBase, device: torch.device) -> TensorDictBase:
        """Where and in what precision the networks are."""
        assert self.trainer is not None
        minibatch = self.trainer.precision_plugin.convert_input(minibatch)
        if not minibatch.batch_size:
            minibatch.batch_size = [self._rank_batch]  # Lightning's conversion to float64 drops it
        return minibatch if device.type == "cpu" else minibatch.to(device)

    def _collect(self) -> list[TensorDictBase]:
        if self.progress.frames < self.offline_frames:
            self.progress.frames += self._round
        else:
            self._collect_chunk()
        updates = self.progress.updates_owed(self.utd, self.warm_up)
        self.progress.updates += updates
        return [self.experience.sample(self._rank_batch) for _ in range(updates)]

    def _collect_chunk(self) -> None:
        chunk = self.stopping.together(lambda: self.surviving(self._next_chunk, self._rebuild_env))
        self._env_broken = False
        if isinstance(self.collector, Workers):
            self.recent.staleness.append(self.collector.staleness)
        self.progress.frames += chunk.numel() * self.ranks.count
        self.progress.episodes += self.recent.add(chunk)
        self.buffer.extend(chunk)

    @property
    def _rank_batch(self) -> int:
        return self.batch_size // self.ranks.count

    def _next_chunk(self) -> TensorDictBase:
        self._env_broken = True  # until the chunk is stored, the environments are ahead of what a checkpoint holds
        if self._chunks is None:
            self._start_env()
        assert self._chunks is not None
        return next(self._chunks)

    def evaluate(self) -> dict[str, dict[str, torch.Tensor]]:
        """Evaluated episodes of each selector: {selector: {return: [E], length: [E]}}.

        Each rank runs its part of them and gets all of them. Their starts do not depend on the number of ranks.
        """
        mine = self.ranks.part(self.eval_episodes)
        env_seed = derive_seed(global_seed(), 0, Purpose.EVAL_ENV)
        for _ in range(mine.start):
            env_seed = seed_generator(env_seed)  # as a batch of environments seeds one after the other
        noise_seed = derive_seed(global_seed(), self.ranks.rank, Purpose.EVAL_NOISE)

        def episodes(selector: str) -> dict[str, torch.Tensor]:
            if not mine:
                return {"return": torch.empty(0), "length": torch.empty(0)}
            if self._eval_env is None:
                self._eval_env = self._build(len(mine))
            policy = self._loss.evaluation_policy(selector, self.eval_candidates)
            return run_episodes(self._eval_env, policy, env_seed, noise_seed, self.stopping.leave)

        def selectors() -> dict[str, dict[str, torch.Tensor]]:
            assert self.trainer is not None
            with self._module.averaged_weights():
                names = self.selectors_of(self._loss)
                return {name: self.surviving(partial(episodes, name), self._drop_eval_env) for name in names}

        evaluated = self.stopping.together(selectors)
        self.check_stop()
        parts = self.ranks.gather(evaluated)
        self.progress.evaluated = self.progress.frames
        return {s: {k: torch.cat([part[s][k] for part in parts]) for k in parts[0][s]} for s in parts[0]}

    def selectors_of(self, loss: OffPolicyLoss) -> list[str]:
        """The selectors of ``data.eval_selector`` that ``loss`` has."""
        return [selector for selector in self.eval_selectors if selector in loss.selectors]

    def check_stop(self, rest: Callable[[], list[TensorDictBase]] | None = None) -> None:
        """Where training may be left at once and gone on with later, raise :class:`Interrupted` if all ranks stop.

        Args:
            rest: gives the updates of the round under way that are still to do.
        """
        try:
            self.stopping.check()
        except Interrupted:
            self._owed = rest() if rest is not None else self._owed
            raise

    def take_recent(self) -> RecentExperience:
        """What was collected since the last call."""
        recent, self.recent = self.recent, RecentExperience()
        return recent

    # Environments that fail.

    def surviving(self, act: Callable[[], T], mend: Callable[[], None]) -> T:
        """What ``act`` gives; where an environment fails, ``mend`` and again, as often as ``data.env_restarts`` allows.

        Raises:
            EnvironmentFault: when it fails once more than that.
            TrainingFault: when training has diverged.
        """
        while True:
            try:
                return act()
            except EnvironmentFault as fault:
                self.stopping.leave()
                if self.progress.env_restarts >= self.env_restarts:
                    raise EnvironmentFault(f"{fault}, after frame {self.progress.frames}") from fault
                self.progress.env_restarts += 1
                log.warning(
                    "%s, after frame %d: built anew (%d of %d), without the episodes under way",
                    fault,
                    self.progress.frames,
                    self.progress.env_restarts,
                    self.env_restarts,
                )
                mend()
            except TrainingFault as fault:
                found = non_finite(self._module.metrics)  # a policy that went wrong did so in an update
                why = f"training diverged: {found}" if found else str(fault)
                raise TrainingFault(f"{why}, after frame {self.progress.frames}") from fault

    def _rebuild_env(self) -> None:
        self._close_envs()
        self._env_new = True

    def _close_envs(self) -> None:
        """Close the training environments."""
        _close(self.env)
        if isinstance(self._chunks, Workers):
            self._chunks.close()
        self._chunks = None

    def _build(self, num_envs: int) -> EnvBase:
        """Make environments in mid-run; what goes wrong then is a fault of theirs, not of a setting."""
        try:
            return self._make_env(num_envs)
        except Exception as error:
            what = one_line(error) or type(error).__name__
            raise EnvironmentFault(f"the environment {self.env_name} could not be made ({what})") from error

    def _drop_eval_env(self) -> None:
        _close(self._eval_env)
        self._eval_env = None

    # State.

    def save_replay(self, folder: Path) -> dict[str, durable.Record]:
        """Write the frames added since the last call into ``folder``; returns the files of all ranks' buffers."""
        parts = self.ranks.attempt(lambda: self.experience.save(folder))
        return {name: record for part in parts for name, record in part.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything a process needs to go on: the ranks' counters, generators, environments; buffers by file name."""
        if not self.started:
            return {}
        return {"progress": asdict(self.progress), "ranks": self.ranks.gather(self._rank_state())}

    def _rank_state(self) -> dict[str, Any]:
        env_state: dict[str, Any] = {"envs": None, "carrier": None}
        if not self._env_broken:
            with contextlib.suppress(NoStateError):
                env_state = self.collector.env_state()
        return {
            "progress": asdict(self.progress),
            "recent": asdict(self.recent),
            "generators": generators_state(),
            "dataset": self._fingerprint,
            **self.experience.state(),
            **env_state,
            "owed": None if self._owed is None else (_stacked(self._owed), len(self._owed)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.trainer is None:  # load_from_checkpoint: the settings alone
            return
        saved = state_dict["ranks"]
        self.check_dataset(state_dict)
        mine = saved[self.ranks.rank] if len(saved) == self.ranks.count else self._adopted(saved)
        self.progress = Progress(**mine["progress"])
        self.recent = RecentExperience(**mine["recent"])
        if mine["replay"] is None:
            self._refill()
        checkpoint = runs.begun_at(self.trainer)
        assert checkpoint is not None
        self.experience.load(mine, saved, checkpoint.replay)
        self._load_envs(mine)
        if mine["owed"] is not None:
            updates, count = mine["owed"]
            self._owed = [minibatch.clone() for minibatch in TensorDict(updates, [count, self._rank_batch])]
        elif self.evaluation_owed:  # stopped between a batch and the evaluation after it: an empty round leads there
            self._owed = []
        self._generators = mine["generators"]

    def _adopted(self, saved: list[dict[str, Any]]) -> dict[str, Any]:
        """This rank's part of the state of another number of ranks."""
        self._say(
            "the checkpoint is of %d processes and goes on with %d: their replay buffers are shared out anew with "
            "every frame, environments go on as far as there are as many, and what follows differs from a run on %d",
            *(len(saved), self.ranks.count, len(saved)),
        )
        return sharding.adopt(saved, self.ranks)

    def _say(self, message: str, *values: object) -> None:
        """Warn of what is so on all ranks, once."""
        if self.ranks.rank == 0:
            log.warning(message, *values)

    def _refill(self) -> None:
        """Without the frames, updates wait for new ones, or go on with the dataset's."""
        if self.warm_up == 0:
            self._say("the checkpoint has no replay buffer (data.save_buffer was false): it begins empty")
            return
        self.progress.refill(self.utd)
        self._say(
            "the checkpoint has no replay buffer (data.save_buffer was false): %d frames are collected "
            "before updates go on, and what follows differs from a run that was not stopped",
            self.init_random_frames,
        )

    def _load_envs(self, mine: dict[str, Any]) -> None:
        """Put the environments where they were, or say that their episodes begin anew."""
        self._begin()
        why = ""
        try:
            if mine["envs"] is None:
                raise NoStateError("the checkpoint has no state of theirs")
            self.collector.load_env_state(mine)
        except NoStateError as reason:
            why = str(reason)
        reasons = self.ranks.gather(why)
        for why in sorted(set(reasons) - {""}):
            whose = [str(rank) for rank, other in enumerate(reasons) if other == why]
            where = f" of rank {', '.join(whose)}" if len(whose) < len(reasons) else ""
            self._say("%s%s begins new episodes (%s); all else goes on as it was", self.env_name, where, why)

    def on_exception(self, exception: BaseException) -> None:
        """Lightning tears nothing down after an exception."""
        if self._watch is not None and not getattr(exception, "agreed", False):
            self._watch.failed(exception)
            self._watch = None
        self.teardown("fit")

    def teardown(self, stage: str) -> None:
        """Close the environments and remove the mapped files when training ends."""
        if self._watch is not None:
            self._watch.done()
            self._watch = None
        self._close_envs()
        _close(self._eval_env)
        if self._mapped is not None:
            shutil.rmtree(self._mapped, ignore_errors=True)


def _stacked(updates: list[TensorDictBase]) -> dict[str, Any]:
    """Minibatches as plain data [updates, batch_size]."""
    return TensorDict.stack(updates).to_dict() if updates else {}


def _close(env: EnvBase | None) -> None:
    """Close an environment that may be closed, broken or absent."""
    if env is not None and not env.is_closed:
        with contextlib.suppress(Exception):
            env.close(raise_if_closed=False)
