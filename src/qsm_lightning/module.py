"""The LightningModule: manual optimization of any off-policy loss, target updates, evaluation metrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from tensordict import TensorDictBase
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from qsm_lightning import trust
from qsm_lightning.datamodule import datamodule_of
from qsm_lightning.distributed import backward
from qsm_lightning.errors import SettingError, TrainingFault, require, require_positive
from qsm_lightning.losses import QSM, OffPolicyLoss
from qsm_lightning.seeding import global_seed

LossFactory = Callable[[int, int], OffPolicyLoss]


class OffPolicyModule(LightningModule):
    """Trains a loss of ``qsm_lightning.losses``: one Adam per term, in the loss's order, then its targets.

    Args:
        observation_dim: width of the observation; known from the environment.
        action_dim: width of the action; known from the environment.
        loss: the algorithm and its settings.
        critic_lr: learning rate of the critics.
        actor_lr: learning rate of the denoiser.
        actor_lr_decay_updates: updates over which the denoiser's rate falls to 0 along a cosine; 0 keeps it constant.

    Raises:
        SettingError: for a value out of range.
    """

    loss: OffPolicyLoss

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        loss: LossFactory = QSM,
        critic_lr: float = 3e-4,
        actor_lr: float = 3e-4,
        actor_lr_decay_updates: int = 2_000_000,
    ) -> None:
        super().__init__()
        require_positive(model__critic_lr=critic_lr, model__actor_lr=actor_lr)
        require(
            actor_lr_decay_updates >= 0,
            f"model.actor_lr_decay_updates is {actor_lr_decay_updates}: it must not be negative",
        )
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.hparams.pop("_instantiator", None)
        if not isinstance(self.hparams["loss"], dict):  # not made by a configuration
            self.hparams["loss"] = loss_spec(loss)
        try:
            self.loss = loss_from_spec(loss)(observation_dim, action_dim)
        except SettingError as error:  # its message begins with the setting's name
            raise SettingError(f"model.loss.{error}") from error
        self.metrics: dict[str, Tensor] = {}

    def training_step(self, batch: TensorDictBase, batch_idx: int) -> None:
        """As many updates as ``batch`` [u, B] has rows; the last one's losses and metrics are kept, detached."""
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        data = datamodule_of(self.trainer)
        for i, minibatch in enumerate(batch.unbind(0)):
            data.check_stop(rest=batch[i:])
            for term, optimizer in zip(self.loss.terms, optimizers, strict=True):
                loss, metrics = self.loss.term_loss(term, minibatch)
                optimizer.zero_grad()
                backward(self, loss, optimizer)
                optimizer.step()
                self.metrics |= {
                    f"loss/{term}": loss.detach(),
                    **{f"update/{k}": v for k, v in metrics.items()},
                }
            self.loss.update_targets()
            for scheduler in schedulers:
                scheduler.step()

    def validation_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> None:
        """Log the evaluated episodes, of all ranks, of each selector; ``eval/return`` is the first one's."""
        frames = datamodule_of(self.trainer).progress.frames
        self.log("step", torch.tensor(frames, dtype=torch.float64))  # x-axis; float32 is exact to 2^24 only
        for i, (selector, episodes) in enumerate(batch.items()):
            prefix = "eval" if i == 0 else f"eval_{selector}"
            returns = episodes["return"]
            if not returns.isfinite().all():
                raise TrainingFault(f"{prefix}/return is NaN or infinite after frame {frames}")
            self.log_dict(
                {
                    f"{prefix}/return": returns.mean(),
                    f"{prefix}/return_std": returns.std(correction=0),
                    f"{prefix}/length": episodes["length"].mean(),
                },
                batch_size=1,
            )

    def on_train_start(self) -> None:
        datamodule_of(self.trainer).start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.run_identity(self.trainer)
        checkpoint["metrics"] = self.metrics
        data = datamodule_of(self.trainer)
        put_at_start_of_epoch(checkpoint["loops"]["fit_loop"], data.epochs, data.batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.metrics = checkpoint["metrics"]

    @staticmethod
    def run_identity(trainer: Trainer) -> dict[str, Any]:
        """What belongs to a run's identity besides the hyper-parameters."""
        return {"seed_everything": global_seed(), "trainer.precision": str(trainer.precision)}

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Adam for every term of the loss: ``critic_lr`` for qvalue; ``actor_lr``, with its decay, for any other."""
        decay = self.hparams["actor_lr_decay_updates"]

        def cosine(update: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * min(update / decay, 1))) if decay else 1.0

        optimizers = {
            term: Adam(
                [p for module in self.loss.term_modules(term) for p in module.parameters()],
                self.hparams["critic_lr"] if term == "qvalue" else self.hparams["actor_lr"],
                fused=True,
            )
            for term in self.loss.terms
        }
        decayed: list[LRScheduler] = [LambdaLR(o, cosine) for term, o in optimizers.items() if term != "qvalue"]
        return list(optimizers.values()), decayed


def put_at_start_of_epoch(fit_loop: dict[str, Any], epoch: int, batches_done: int) -> None:
    """Set the saved counters of Lightning's loops to the start of ``epoch`` after ``batches_done``, in place.

    How far between two evaluations a run is, frames tell; Lightning's own count of batches within the epoch would have
    to agree with them wherever a run was stopped.
    """
    for counts in fit_loop["epoch_progress"].values():
        counts.update(dict.fromkeys(counts, epoch))
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["total"].update(dict.fromkeys(batches["total"], batches_done))
    batches["current"].update(dict.fromkeys(batches["current"], 0))
    batches["is_last_batch"] = False
    evaluations = fit_loop["epoch_loop.val_loop.batch_progress"]
    for counts in (evaluations["total"], evaluations["current"]):
        counts.update(dict.fromkeys(counts, 0))
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = batches_done


def _as_list(one_or_more: Any) -> list[Any]:
    """Lightning hands over a single optimizer or scheduler bare, and several in a list."""
    return one_or_more if isinstance(one_or_more, list) else [one_or_more] if one_or_more is not None else []


def loss_spec(loss: LossFactory | dict[str, Any]) -> dict[str, Any]:
    """A loss factory (a class, or ``functools.partial`` of one) as the plain data that a checkpoint keeps."""
    if isinstance(loss, dict):
        return loss
    cls: Any = loss.func if isinstance(loss, partial) else loss
    settings = loss.keywords if isinstance(loss, partial) else {}
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dict(settings)}


def loss_from_spec(spec: LossFactory | dict[str, Any]) -> LossFactory:
    """The inverse of :func:`loss_spec`. It imports what the data name: see :mod:`qsm_lightning.trust`."""
    if not isinstance(spec, dict):
        return spec
    cls = trust.import_class(spec["class_path"])
    require(
        isinstance(cls, type) and issubclass(cls, OffPolicyLoss),
        f"the checkpoint's model.loss is {spec['class_path']!r}, which is not an OffPolicyLoss; choose another",
    )
    return partial(cls, **spec["init_args"])
