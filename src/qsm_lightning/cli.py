"""``qsm-fit`` and ``qsm-eval``: a thin LightningCLI, and an evaluation of what it saved."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser
import torch
from jsonargparse import ActionConfigFile, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeInt
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qsm_lightning import callbacks as cb
from qsm_lightning import checkpoints
from qsm_lightning.datamodule import OffPolicyDataModule
from qsm_lightning.errors import Interrupted, SettingError, TrainingFault, require
from qsm_lightning.losses import QSM, QSMLoss
from qsm_lightning.messages import ParserErrors, loss_settings, one_line, shipped_config
from qsm_lightning.module import OffPolicyModule

EPILOG = """
Settings of the algorithm (model.loss), with their defaults:
{loss_settings}

Examples:
  qsm-fit --config conf/hopper.yaml
  qsm-fit --config hopper --data.total_frames 200000 --model.loss.m_q 20 --seed_everything 1
  qsm-fit --config runs/Hopper-v5/version_0/config.yaml --ckpt_path last
"""


class HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """jsonargparse's help, with the epilog's lines as they are."""


def loss_help() -> str:
    """A line for each setting of QSM: its option, default and meaning."""
    meanings: dict[str, str | None] = {}
    for cls in (QSMLoss, QSM):
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

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = FitParser(**kwargs, epilog=EPILOG.format(loss_settings=loss_help()), formatter_class=HelpFormatter)
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
            type=bool | NonNegativeInt,
            default=self.seed_everything_default,
            help="Seed of envs, buffer sampler, networks and noise; true draws one.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.observation_dim", "model.observation_dim", apply_on="instantiate")
        parser.link_arguments("data.action_dim", "model.action_dim", apply_on="instantiate")
        parser.add_argument(
            "--name", type=str | None, default=None, help="Folder of the run; the env's name by default."
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Checkpoint to resume from: a file, or last."
        )
        parser.add_lightning_class_args(cb.TrainingMetrics, "metrics")
        parser.add_lightning_class_args(cb.PolicyPicture, "picture")
        parser.set_defaults({"model.loss": {"class_path": "qsm_lightning.losses.QSM"}})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer of the configuration, logging to <default_root_dir>/<name>/<version>."""
        settings = self.config_init["trainer"]
        root = Path(settings["default_root_dir"] or "runs")
        checkpoints.check_writable(root)
        require(
            settings["check_val_every_n_epoch"] == 1 and settings["val_check_interval"] is None,
            "trainer.check_val_every_n_epoch and trainer.val_check_interval are not used: data.eval_every_frames "
            "sets how often the policy is evaluated",
        )
        require(
            settings["accelerator"] not in ("gpu", "cuda") or torch.cuda.is_available(),
            f"trainer.accelerator is {settings['accelerator']!r}: there is no GPU here; use cpu or auto",
        )
        if settings["logger"] in (None, True):
            name = self.config["name"] or run_name(self.config["data"]["env"])
            board = TensorBoardLogger(str(root), name, default_hp_metric=False)
            kwargs["logger"] = [board, CSVLogger(str(root), name, board.version, flush_logs_every_n_steps=1)]
        if settings["strategy"] == "auto" and several_devices(settings):
            # each update's two backward passes use only a part of the module
            kwargs["strategy"] = "ddp_find_unused_parameters_true"
        own: list[Callback] = [cb.StopOnNonFinite(), cb.CheckpointOnSignal()]
        if settings["enable_progress_bar"] is not False:
            own.append(cb.FrameProgress())
        if settings["enable_checkpointing"] is not False:
            own.append(cb.RunCheckpoint())
        given = settings["callbacks"] or []
        kwargs["callbacks"] = own + (given if isinstance(given, list) else [given])
        return super().instantiate_trainer(**kwargs)


def several_devices(settings: Any) -> bool:
    """Whether the trainer's settings ask for more than one process."""
    if settings["devices"] == "auto":
        gpus = torch.cuda.device_count() if settings["accelerator"] in ("auto", "gpu", "cuda") else 0
        return gpus > 1 or settings["num_nodes"] > 1
    return settings["devices"] not in (1, "1") or settings["num_nodes"] > 1


class SaveResolvedConfig(SaveConfigCallback):
    """Writes the run's resolved configuration, without the checkpoint it was resumed from."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, stage)


def run_name(env: str) -> str:
    """The folder name of an environment's runs: dmc:cartpole/swingup -> dmc-cartpole-swingup."""
    return env.replace(":", "-").replace("/", "-")


def fit(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-fit``: train, then print where everything is. See ``qsm-fit --help``."""
    run_command("qsm-fit", lambda: _fit(args))


def _build(args: list[str] | None) -> FitCLI:
    """Parse and instantiate everything; whatever is wrong with the settings ends in a :class:`SettingError`."""
    try:
        return _cli(args)
    except SettingError:
        raise
    except (MisconfigurationException, OmegaConfBaseException, ValueError) as error:
        raise SettingError(one_line(error)) from error


def _cli(args: list[str] | None) -> FitCLI:
    return FitCLI(
        OffPolicyModule,
        OffPolicyDataModule,
        args=args,
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
    cli = _build(args)
    trainer, config = cli.trainer, cli.config
    ckpt_path = checkpoints.resolve(config["ckpt_path"], checkpoints.run_folder(trainer))
    if ckpt_path is not None:
        checkpoints.check_resumable(ckpt_path, cli.model, cli.datamodule)
    if trainer.is_global_zero:
        print(f"qsm-fit: {checkpoints.run_folder(trainer)}", flush=True)
    writer = next((c for c in trainer.checkpoint_callbacks if isinstance(c, cb.RunCheckpoint)), cb.RunCheckpoint())
    try:
        trainer.fit(cli.model, cli.datamodule, ckpt_path=ckpt_path, weights_only=True)
    except TrainingFault as fault:
        good = ckpt_path if writer.saved_at_frames is None else writer.last
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingFault(f"{fault}; {where}") from fault
    except MisconfigurationException as error:
        raise SettingError(one_line(error)) from error
    if trainer.is_global_zero:
        print(closing_words(trainer, writer))


def closing_words(trainer: Trainer, writer: cb.RunCheckpoint) -> str:
    """Final and best return, where the checkpoints are, and what to type next."""
    final = trainer.callback_metrics.get("eval/return")
    lines = []
    if final is not None:
        best = final.item() if writer.best_return is None else writer.best_return
        lines = [f"final return: {final.item():.2f}", f"best return: {best:.2f}"]
    files = [str(path) for path in (writer.best, writer.last) if path is not None and path.is_file()]
    if writer.saved_at_frames is None:
        return "\n".join([*lines, "checkpoints: none"])
    run = checkpoints.run_folder(trainer)
    lines += [f"checkpoints: {', '.join(files)}", f"next: qsm-eval {run}"]
    return "\n".join([*lines, f"      tensorboard --logdir {run}"] if trainer.loggers else lines)


def evaluate(args: list[str] | None = None) -> None:
    """Entry point of ``qsm-eval``: evaluate a run or checkpoint. See ``qsm-eval --help``."""
    from qsm_lightning.evaluate_command import run

    run_command("qsm-eval", lambda: run(args))


def run_command(prog: str, command: Callable[[], None]) -> None:
    """Run a command's body and turn the ways it can end early into one sentence and an exit status."""
    _quiet()
    try:
        command()
    except SettingError as error:
        _stop(prog, str(error), 2)
    except TrainingFault as error:
        _stop(prog, str(error), 3)
    except Interrupted as stop:
        resume = f"\nresume with: {checkpoints.resume_command(Path(stop.checkpoint))}" if stop.checkpoint else ""
        _stop(prog, f"{stop}{resume}", 128 + stop.signum)
    except KeyboardInterrupt:
        _stop(prog, "interrupted; nothing was saved since the last checkpoint", 130)


def _stop(prog: str, message: str, status: int) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process ends now, with this status
    print(f"{prog}: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def _quiet() -> None:
    """Leave out what Lightning and TorchRL say about things this package decided on purpose."""
    for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed", "torchrl"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*does not have many workers.*",
        ".*directory .* exists and is not empty.*",
        ".*LeafSpec.*",
        ".*precision lowered by casting.*",
    ):
        warnings.filterwarnings("ignore", message=text)
