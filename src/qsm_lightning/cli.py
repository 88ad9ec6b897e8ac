"""``qsm-fit``: a thin LightningCLI."""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ProgressBar, Timer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qsm_lightning import callbacks as cb
from qsm_lightning import checkpoints, durable, launching, resources, resume, runs, trust
from qsm_lightning.checkpoints import Checkpoint
from qsm_lightning.commands.base import ignore_ctrl_c, run_command
from qsm_lightning.datamodule import OffPolicyDataModule, datamodule_of
from qsm_lightning.errors import Interrupted, SettingError, TrainingFault, one_line, require
from qsm_lightning.loggers import run_loggers
from qsm_lightning.losses import ALGORITHMS, QSM
from qsm_lightning.messages import ParserErrors, loss_settings, sentence, shipped_config
from qsm_lightning.module import OffPolicyModule
from qsm_lightning.precision import check_precision
from qsm_lightning.seeding import check_seed

log = logging.getLogger(__name__)

# Of Lightning's settings those that mean something else here or nothing: the values they may have, and the mend.
CADENCE = "data.eval_every_frames sets how often the policy is evaluated, data.total_frames how long it trains"
UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {  # an int is not a share
    "check_val_every_n_epoch": ((1,), CADENCE),
    "val_check_interval": ((None,), CADENCE),
    "limit_train_batches": ((None, 1.0), CADENCE),
    "limit_val_batches": ((None, 0, 1, 1.0), "an evaluation is one batch; data.eval_episodes sets how long it is"),
    "overfit_batches": ((0, 0.0), CADENCE),
    "accumulate_grad_batches": ((1,), "give data.batch_size all frames of an update"),
    "barebones": ((False,), "it takes loggers and checkpoints away; set trainer.logger and the like to false"),
}

OF_LOSS = ("--model.loss", "--model.loss.help")  # options that name an algorithm
CHOSEN = "QSM_CHECKPOINT"  # tells processes that this one starts which checkpoint they go on from

EPILOG = """
Settings of the algorithm (model.loss), with their defaults:
{loss_settings}

Examples:
  qsm-fit --config conf/hopper.yaml
  qsm-fit --config hopper --data.total_frames 200000 --model.loss.m_q 20 --seed_everything 1
  qsm-fit --resume runs/Hopper-v5/version_0
  qsm-fit --resume runs/Hopper-v5/version_0 --data.total_frames 2000000
"""


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the epilog's lines as they are."""


def loss_help() -> str:
    """A line for each setting of QSM: its option, default and meaning."""
    meanings: dict[str, str | None] = {}
    for cls in reversed(QSM.__mro__):
        meanings |= {p.arg_name: p.description for p in docstring_parser.parse(cls.__doc__ or "").params}
    lines = []
    for name, default in loss_settings(QSM).items():
        value = list(default) if isinstance(default, tuple) else default
        lines.append(f"  --model.loss.{name} {value}\n      {one_line(meanings[name])}")
    return "\n".join(lines)


class FitParser(ParserErrors, LightningArgumentParser):
    """LightningCLI's parser, with errors in one sentence."""


class ShippedConfigFile(ActionConfigFile):
    """A configuration file by path, or a shipped one by name."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        super().__call__(parser, cfg, shipped_config(values), option_string)


class FitCLI(LightningCLI):
    """LightningCLI without subcommands, with this project's callbacks, loggers and run folders."""

    def __init__(self, *args: Any, run_folder: Path | None = None, **kwargs: Any) -> None:
        self.run_folder = run_folder
        self.trusted = False  # by the command line; a configuration cannot vouch for itself
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FitParser(**kwargs, epilog=EPILOG.format(loss_settings=loss_help()), formatter_class=HelpFormatter)
        parser.allow_abbrev = False  # a shortened option would not be seen before the configuration is checked
        parser.add_argument(
            "-c",
            "--config",
            action=ShippedConfigFile,
            help="YAML file, or the name of a shipped one such as hopper.",
        )
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=self.seed_everything_default,
            help="Seed of envs, buffer sampler, networks and noise.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.observation_dim", "model.observation_dim", apply_on="instantiate")
        parser.link_arguments("data.action_dim", "model.action_dim", apply_on="instantiate")
        parser.add_argument(
            "--name", type=str | None, default=None, help="Folder of the run; the env's name by default."
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="Checkpoint to go on from: last, best, or one's folder. The run goes on in its own folder.",
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Folder of a run to go on with: short for --config FOLDER/config.yaml --ckpt_path last.",
        )
        parser.add_argument(
            "--trust",
            action="store_true",
            help="Also go on with a run whose settings name code outside of qsm_lightning, torch, torchrl and "
            "pytorch_lightning: loading them runs it.",
        )
        parser.add_lightning_class_args(cb.RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(cb.TrainingMetrics, "metrics")
        parser.add_lightning_class_args(cb.PolicyPicture, "picture")
        parser.set_defaults({"model.loss": {"class_path": "qsm_lightning.losses.QSM"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        check_seed(self.config["seed_everything"], "seed_everything")

    def before_instantiate_classes(self) -> None:
        """Find and verify the checkpoint to go on from."""
        self.checkpoint: Checkpoint | None = None
        self.held: Any = None
        ckpt_path = self.config["ckpt_path"]
        if ckpt_path is None:
            return
        if chosen := _chosen():
            self.checkpoint = Checkpoint(Path(chosen))
            return
        siblings = self._root / self._name
        place = (ckpt_path, self.run_folder, siblings)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self.held = runs.lock(resume.wanted(*place).run)  # before looking which is its newest
        self.checkpoint, passed_over = resume.whole(resume.wanted(*place))
        for passed in passed_over if rank_zero_only.rank == 0 else []:  # type: ignore[attr-defined]
            log.warning(passed)

    def identity(self) -> dict[str, Any]:
        """The settings that make the run what it is, dotted."""
        return dict(resume.identity(self.datamodule.hparams, self.model.hparams, self.model.run_identity(self.trainer)))

    @property
    def writer(self) -> cb.RunCheckpoint | None:
        """What writes the run's checkpoints, if they are written."""
        return next((c for c in self.trainer.checkpoint_callbacks if isinstance(c, cb.RunCheckpoint)), None)

    def buffer_report(self, run: Path) -> str:
        """:func:`resources.report` of the run in this folder."""
        trainer = self.trainer
        there = (trainer.num_nodes, trainer.world_size, trainer.strategy.root_device)
        return resources.report(self.datamodule, run, self.writer is not None, *there)

    @property
    def _root(self) -> Path:
        return Path(os.path.expandvars(self.config["trainer"]["default_root_dir"] or "runs")).expanduser()

    @property
    def _name(self) -> str:
        return self.config["name"] or run_name(self.config["data"]["env"])

    def _check_folder(self, run: Path) -> None:
        durable.check_folder(run, "the run's folder, by trainer.default_root_dir and name,")
        if self.config["data"]["storage"] == "memmap" and self.config["data"]["storage_dir"]:
            durable.check_folder(Path(self.config["data"]["storage_dir"]), "data.storage_dir")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the configuration, logging to <default_root_dir>/<name>/<version>."""
        settings = self.config_init["trainer"]
        self._check_folder(self.checkpoint.run if self.checkpoint else self._root / self._name)
        for name, (unused, mend) in UNUSED.items():
            value = settings[name]
            same = any(value == other and type(value) is type(other) for other in unused)
            require(same, f"trainer.{name} is {value}, which cannot be used: {mend}")
        require(
            settings["accelerator"] not in ("gpu", "cuda") or torch.cuda.is_available(),
            f"trainer.accelerator is {settings['accelerator']!r}: there is no GPU here; use cpu or auto",
        )
        check_precision(settings["precision"], settings["accelerator"])
        self.model.set_gradient_clipping(settings["gradient_clip_val"], settings["gradient_clip_algorithm"])
        kwargs |= {"gradient_clip_val": None, "gradient_clip_algorithm": None}  # refused in manual optimization
        if settings["logger"] in (None, True):
            kwargs["logger"] = run_loggers(self.checkpoint.run if self.checkpoint else None, self._root, self._name)
        kwargs |= launching.trainer_settings(settings)
        own: list[Callback] = [cb.StopOnNonFinite(), cb.StopOnSignal()]
        given = settings["callbacks"] or []
        given = given if isinstance(given, list) else [given]
        if settings["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
            own.append(cb.FrameProgress())
        kwargs["callbacks"] = own + given
        if settings["enable_checkpointing"] is False:
            del self.parser.callback_keys[self.parser.callback_keys.index("checkpoint")]
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:
            raise SettingError(f"trainer: {one_line(error)}") from error
        except RuntimeError as error:  # of a run that goes on, config.yaml has its callbacks already
            raise SettingError(f"trainer.callbacks: {one_line(error)}; give each once") from error


class SaveResolvedConfig(SaveConfigCallback):
    """Writes the run's resolved configuration, without what only this command was told about resuming."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if not trainer.is_global_zero or self.already_saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        config = self.config.clone()
        config["ckpt_path"], config["resume"], config["trust"] = None, None, False
        config["model.actor_lr_decay_updates"] = pl_module.hparams["actor_lr_decay_updates"]  # null was the loss's own
        text = self.parser.dump(config, skip_none=False)
        folder = runs.run_folder(trainer)
        with durable.writing(folder, "trainer.default_root_dir"):
            durable.write_files(folder, {self.config_filename: text.encode()})
        self.already_saved = True


def run_name(env: str) -> str:
    """The folder name of an environment's runs: dmc:cartpole/swingup -> dmc-cartpole-swingup."""
    return re.sub(r"[^\w.=]+", "-", env)


def fit(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-fit``: train, then print where everything is. See ``qsm-fit --help``."""
    run_command("qsm-fit", lambda: _fit(args))


def build(args: list[str] | None) -> FitCLI:
    """Parse and instantiate everything; whatever is wrong with the settings ends in a :class:`SettingError`."""
    try:
        args, run, trusted = _resumed(_with_class_of_loss(_printing_last(sys.argv[1:] if args is None else args)))
        cli = _cli(args, run)
    except SettingError:
        raise
    except (MisconfigurationException, OmegaConfBaseException, ValueError, ImportError) as error:
        raise SettingError(sentence(str(error), [])) from error
    cli.trusted = trusted
    cli.datamodule.check_ranks(cli.trainer.world_size)
    cli.datamodule.check_loss(cli.model.loss)
    cli.model.check_callbacks(cli.trainer, cli.datamodule)
    cli.model.compiles(cli.trainer, cli.datamodule)
    return cli


def _with_class_of_loss(args: list[str]) -> list[str]:
    """The arguments with ``--model.loss sac``, and ``--model.loss.help sac``, as a class path."""
    named = {name: f"qsm_lightning.losses.{cls.__name__}" for name, cls in ALGORITHMS.items()}
    found: list[str] = []
    for arg in args:
        option, _, name = arg.partition("=")
        if option in OF_LOSS and name in named:
            arg = f"{option}={named[name]}"
        elif found and found[-1] in OF_LOSS:
            arg = named.get(arg, arg)
        found.append(arg)
    return found


def _printing_last(args: list[str]) -> list[str]:
    """The arguments with ``--print_config`` at the end: jsonargparse prints what came before it."""
    return sorted(args, key=lambda arg: arg.partition("=")[0] == "--print_config")


def _resumed(args: list[str]) -> tuple[list[str], Path | None, bool]:
    """The arguments with ``--resume`` written out, the run whose configuration they name, whether it is trusted.

    A configuration in a run's folder may come from a stranger: it is checked before any of it is used.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("-c", "--config", action="append", default=[])
    first.add_argument("--resume")
    first.add_argument("--trust", action="store_true")
    try:
        known, _ = first.parse_known_args(args)
    except argparse.ArgumentError as error:  # a value too few or too many
        raise SettingError(f"{one_line(error)}; see qsm-fit --help") from error
    if known.resume is not None:
        run, ckpt_path = resume.run_of(_chosen() or known.resume)
        config = run / runs.CONFIG
        known.config.append(str(config))
        args = ["--config", str(config), "--ckpt_path", ckpt_path, *args]
    files = [file for path in map(Path, known.config) for file in dict.fromkeys((path, path.resolve()))]
    of_runs = [file for file in files if file.is_file() and (file.parent / runs.CHECKPOINTS).is_dir()]
    if not known.trust:
        for path in of_runs:
            trust.check_config(path)
    given = [file for file in of_runs if str(file) in known.config] or of_runs
    return args, given[-1].parent if given else None, known.trust


def _chosen() -> str | None:
    """The checkpoint that the process which started this one goes on from."""
    return os.environ.get(CHOSEN) if rank_zero_only.rank > 0 else None  # type: ignore[attr-defined]


def _cli(args: list[str], run: Path | None) -> FitCLI:
    return FitCLI(
        OffPolicyModule,
        OffPolicyDataModule,
        args=args,
        run_folder=run,
        run=False,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=SaveResolvedConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "parser_mode": "omegaconf",
            "prog": "qsm-fit",
            "description": "Train a diffusion policy by Q-score matching.",
        },
        trainer_defaults={
            "default_root_dir": "runs",
            "max_epochs": -1,
            "num_sanity_val_steps": 0,
            "inference_mode": False,
            "enable_checkpointing": None,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    )


def _fit(args: list[str] | None) -> None:
    launching.end_with_parent()
    cli = build(args)
    trainer, checkpoint = cli.trainer, cli.checkpoint
    run = checkpoint.run if checkpoint else runs.run_folder(trainer)
    progress = _checked_progress(cli, checkpoint) if checkpoint is not None else None
    undo = None
    if trainer.local_rank == 0:
        size = cli.buffer_report(run)
    if trainer.is_global_zero:
        held = cli.held or runs.lock(run)
        require(
            checkpoint is not None or not checkpoints.complete(run / runs.CHECKPOINTS),
            f"trainer.default_root_dir is {str(run)!r}: without a logger that has a folder, checkpoints lie there, and "
            "those of another run do already; choose another",
        )
        if checkpoint is not None and progress is not None:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                undo = _go_back_to(checkpoint, progress)
            os.environ[CHOSEN] = str(checkpoint.path)
        at = f" from frame {checkpoint.order[0]}" if checkpoint else ""
        print(f"qsm-fit: {run}{at}\n{size}", flush=True)
        if cli.model.compiles(cli.trainer, cli.datamodule):
            print("compiling the update: a minute or so the first time, seconds when torch has kept it", flush=True)
    writer = cli.writer
    try:
        trainer.ckpt_path = checkpoint.state if checkpoint else None  # in this way it is known from the first hook on
        trainer.fit(cli.model, cli.datamodule, weights_only=True)
    except (Interrupted, TrainingFault) as stop:
        last = (writer.last if writer else None) or checkpoint
        stop.checkpoint = last.path if last else None
        raise
    except (MisconfigurationException, SettingError) as error:
        if undo is not None and progress is not None and cli.datamodule.progress.frames <= progress["frames"]:
            undo()  # nothing was trained
        raise SettingError(one_line(error)) from error
    finally:
        ignore_ctrl_c()
    if trainer.is_global_zero:
        print(closing_words(trainer, writer, checkpoint))
        held.close()


def _checked_progress(cli: FitCLI, checkpoint: Checkpoint) -> dict[str, Any]:
    """The counters of the checkpoint that a run goes on from, after what can be said of it before anything is changed.

    Raises:
        SettingError: when training cannot go on from it with these settings, or it is not trusted.
    """
    state = checkpoints.load(checkpoint.state)
    data = state["OffPolicyDataModule"]
    if not cli.trusted:
        trust.check_state(state, checkpoint.state)
    resume.check_settings(checkpoint, state, cli.identity())
    resume.check_frames(checkpoint, state, cli.datamodule.total_frames)
    resume.check_time(cli.trainer, state)
    cli.datamodule.check_dataset(data)
    if cli.trainer.is_global_zero and (other := resume.other_versions(checkpoint)):
        log.warning("%s was made with %s: what follows may differ in the last bits", checkpoint.path, other)
    return data["progress"]


def _go_back_to(checkpoint: Checkpoint, progress: dict[str, Any]) -> Callable[[], None]:
    """Have a run's folder end at the checkpoint that it goes on from; what is returned takes that back."""
    put_back = runs.remember(checkpoint.run)
    aside = checkpoints.set_aside_after(checkpoint)  # first: with newer ones there, the curves must reach them
    runs.cut_curves(checkpoint.run, progress["frames"], progress["evaluated"] == progress["frames"])

    def undo() -> None:
        put_back()
        for path in aside:
            path.rename(path.with_name(path.name.partition(".aside")[0]))

    return undo


def closing_words(trainer: Trainer, writer: cb.RunCheckpoint | None, begun_at: Checkpoint | None = None) -> str:
    """Final and best return, what ended the run early, where the checkpoints are, and what to type next.

    Args:
        trainer: at the end of training.
        writer: of the checkpoints, if any are written.
        begun_at: the checkpoint that the run went on from.
    """
    final = trainer.callback_metrics.get("eval/return")
    lines = []
    if final is not None:
        best = final.item() if writer is None or writer.best_return is None else writer.best_return
        lines = [f"final return: {final.item():.2f}", f"best return: {best:.2f}"]
    data = datamodule_of(trainer)
    if data.progress.frames < data.total_frames and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        lines += [f"stopped early, at frame {data.progress.frames} of {data.total_frames}, by {stopped_by(trainer)}"]
    last = (writer.last or begun_at) if writer is not None else None
    if writer is None or last is None:
        return "\n".join([*lines, "checkpoints: none"])
    files = [str(c.path) for c in dict.fromkeys((writer.best, last)) if c is not None]
    run = shlex.quote(str(last.run))
    lines += [f"checkpoints: {', '.join(files)}", f"next: qsm-eval {run}"]
    board = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
    return "\n".join([*lines, f"      tensorboard --logdir {run}"] if board else lines)


def stopped_by(trainer: Trainer) -> str:
    """What ended training before its last frame."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return "trainer.max_steps"
    if 0 <= (-1 if trainer.max_epochs is None else trainer.max_epochs) <= trainer.current_epoch:
        return "trainer.max_epochs"
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in callbacks if isinstance(timer, Timer)]
    if any(seconds is not None and seconds <= 0 for seconds in left):
        return "trainer.max_time"
    for callback in callbacks:  # last: a resumed run keeps the reason that once ended it
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
            return f"EarlyStopping on {callback.monitor}"
    return "a callback"
