"""The LightningModule: manual optimization of any off-policy loss, target updates, evaluation metrics."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any, Literal, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.plugins import MixedPrecision
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from qsm_lightning import trust
from qsm_lightning.compiled import WORTHWHILE_UPDATES, CompiledUpdate, Due, missing_for_compiling
from qsm_lightning.datamodule import OffPolicyDataModule, datamodule_of
from qsm_lightning.distributed import backward
from qsm_lightning.errors import (
    SettingError,
    TrainingFault,
    first_line,
    require,
    require_not_negative,
    require_positive,
)
from qsm_lightning.losses import QSM, OffPolicyLoss
from qsm_lightning.losses.base import polyak_update
from qsm_lightning.precision import full_precision
from qsm_lightning.progress import exact_fraction
from qsm_lightning.seeding import global_seed

log = logging.getLogger(__name__)

# Lightning's callbacks that cannot be used here, and what is there instead.
AUTOMATIC = {
    StochasticWeightAveraging: "use model.ema",
    WeightAveraging: "use model.ema",
    BatchSizeFinder: "set data.batch_size",
    LearningRateFinder: "set model.critic_lr and model.actor_lr",
    GradientAccumulationScheduler: "give data.batch_size all frames of an update",
}
EVALUATED = ("return", "return_std", "length")  # what is logged of an evaluation's episodes
MAX_SKIPPED_IN_A_ROW = 20  # from GradScaler's first scale, 65536, down to 0.06

LossFactory = Callable[[int, int], OffPolicyLoss]


class OffPolicyModule(LightningModule):
    """Trains a loss of ``qsm_lightning.losses``: one Adam per term, in the loss's order, then its targets.

    Args:
        observation_dim: width of the observation; known from the environment.
        action_dim: width of the action; known from the environment.
        loss: the algorithm and its settings.
        critic_lr: learning rate of the critics.
        actor_lr: learning rate of the denoiser.
        actor_lr_decay_updates: updates over which all rates but the critics' fall to 0 along a cosine; 0 keeps them.
            By default what the algorithm has of its own: 2,000,000 for QSM and CQSM, and 0 for others.
        ema: decay per update, in (0, 1), of an exponential moving average of the denoiser's weights, which is then what
            is evaluated; none by default.
        compile: make each update one compiled function (true), or not (false); auto does in runs of at least 20,000
            updates by one process on a CPU, where there is a C++ compiler. Acting is compiled as well, where it can be.
            On a GPU both are replayed as CUDA graphs.

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
        actor_lr_decay_updates: int | None = None,
        ema: float | None = None,
        compile: bool | Literal["auto"] = "auto",
    ) -> None:
        super().__init__()
        require_positive("model.", critic_lr=critic_lr, actor_lr=actor_lr)
        require_not_negative("model.", actor_lr_decay_updates=actor_lr_decay_updates)
        require(ema is None or 0 < ema < 1, f"model.ema is {ema}: it must be between 0 and 1, such as 0.999, or null")
        require(
            isinstance(compile, bool) or compile == "auto", f"model.compile is {compile!r}: choose auto, true or false"
        )
        self.automatic_optimization = False
        require(loss is not None, "model.loss is null: name an algorithm, such as qsm_lightning.losses.QSM")
        self.save_hyperparameters()
        self.hparams.pop("_instantiator", None)
        if not isinstance(self.hparams["loss"], dict):  # not made by a configuration
            self.hparams["loss"] = loss_spec(loss)
        make_loss = loss_from_spec(loss)
        try:
            self.loss = make_loss(observation_dim, action_dim)
        except SettingError as error:  # its message begins with the setting's name
            raise SettingError(f"model.loss.{error}") from error
        if actor_lr_decay_updates is None:
            self.hparams["actor_lr_decay_updates"] = self.loss.actor_lr_decay_updates
        if ema is not None:
            self.averages = nn.ModuleList(map(deepcopy, self._averaged)).requires_grad_(False)
        self.metrics: dict[str, Tensor] = {}
        self.updates = 0
        self.skipped_steps = 0
        self._skipped_in_a_row: Counter[str] = Counter()
        self._loss_scale = 1.0
        self._compiled: CompiledUpdate | None = None
        self._last_compiled: bool | None = None  # how the last update was made
        self.set_gradient_clipping(None)

    def set_gradient_clipping(self, value: float | None, algorithm: Literal["norm", "value"] | None = None) -> None:
        """Clip the gradients of each optimizer, before ``fit``; Lightning's Trainer does not in manual optimization.

        Args:
            value: greatest norm over all of an optimizer's parameters, or greatest magnitude of each entry; None for
                no clipping.
            algorithm: ``norm`` (the default) or ``value``.

        Raises:
            SettingError: for a value out of range.
        """
        require(
            value is None or value > 0,
            f"trainer.gradient_clip_val is {value}: it must be greater than 0, or null for no clipping",
        )
        require(
            algorithm in ("norm", "value", None),
            f"trainer.gradient_clip_algorithm is {algorithm!r}: choose norm or value",
        )
        self.gradient_clip_val = value
        self.gradient_clip_algorithm = None if value is None else algorithm or "norm"

    def training_step(self, batch: Iterable[list[TensorDictBase]], batch_idx: int) -> None:
        """An update for every minibatch [B] of every round; the last one's losses and metrics are kept, detached."""
        optimizers, schedulers = _as_list(self.optimizers()), _as_list(self.lr_schedulers())
        data = datamodule_of(self.trainer)
        for updates in batch:
            for i, minibatch in enumerate(updates):
                data.check_stop(rest=partial(updates.__getitem__, slice(i, None)))
                self.updates += 1
                due = tuple(filter(self._due, (*self.loss.terms, "targets")))
                compiled = self._compiled is not None and self._update_compiled(minibatch, optimizers, due)
                if not compiled:
                    self._update(minibatch, optimizers, due)
                if compiled is not self._last_compiled:
                    self._note(compiled)
                for scheduler in schedulers:
                    scheduler.step()

    def _update(self, minibatch: TensorDictBase, optimizers: list[Any], due: Due) -> None:
        skipped = False
        for term, optimizer in zip(self.loss.terms, optimizers, strict=True):
            if term not in due:
                continue
            loss, metrics = self.loss.term_loss(term, minibatch)
            optimizer.zero_grad()
            backward(self, loss, optimizer)
            optimizer.step()
            if self._overflowed(term):
                skipped = True
                continue
            self.metrics |= {f"loss/{term}": loss.detach(), **{f"update/{k}": v for k, v in metrics.items()}}
        if not skipped:
            self._follow(due)

    def _due(self, term: str) -> bool:
        """Whether a term, or ``targets``, is stepped in the update under way."""
        return self.updates % self.loss.every.get(term, 1) == 0

    def _update_compiled(self, minibatch: TensorDictBase, optimizers: list[Any], due: Due) -> bool:
        """The same as one function, if that can be made."""
        assert self._compiled is not None
        try:
            self.metrics |= self._compiled(minibatch, due)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = f"{type(self.loss).__name__} cannot be compiled ({first_line(error)})"
            require(self.hparams["compile"] == "auto", f"model.compile is true, but {why}; use auto or false")
            log.warning("%s: its updates are slower", why)
            self._compiled.release()
            self._compiled, self._last_compiled = None, False
            return False
        for term, optimizer in zip(self.loss.terms, optimizers, strict=True):
            if term in due:  # Lightning counts them
                optimizer._on_before_step()
                optimizer._on_after_step()
        return True

    def _note(self, compiled: bool) -> None:
        if self._last_compiled is not None and self.trainer.is_global_zero:
            log.warning(
                "updates were %s and are %s from here on (model.compile): what follows differs by rounding from a run "
                "that was not stopped",
                *("compiled", "plain") if self._last_compiled else ("plain", "compiled"),
            )
        self._last_compiled = compiled

    def _follow(self, due: Due) -> None:
        """What moves after the optimizers have stepped."""
        if "targets" in due:
            self.loss.update_targets()
        self._update_averages()

    @full_precision
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Outside of autocast, where a training step is: each gradient in the precision of its forward pass."""
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the optimizer's gradients, from which the loss scale has been taken out."""
        if self.gradient_clip_val is not None:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _overflowed(self, term: str) -> bool:
        """Whether the loss scaler of 16-mixed skipped the step just made, as gradients of ``term`` were not finite.

        It says so at the first, second, fourth, eighth ... skipped step: in a long run the scale grows until one is
        skipped, again and again.

        Raises:
            TrainingFault: when a lower scale has not helped for many steps.
        """
        if self.trainer.scaler is None:
            return False
        before, self._loss_scale = self._loss_scale, self.trainer.scaler.get_scale()
        if self._loss_scale >= before:
            self._skipped_in_a_row[term] = 0
            return False
        self._skipped_in_a_row[term] += 1
        self.skipped_steps += 1
        frames, in_a_row = datamodule_of(self.trainer).progress.frames, self._skipped_in_a_row[term]
        if in_a_row >= MAX_SKIPPED_IN_A_ROW:
            fault = TrainingFault(
                f"training diverged: the gradients of loss/{term} are NaN or infinite at frame {frames}, "
                f"{in_a_row} times in a row, also with a loss scale of {self._loss_scale:g}"
            )
            datamodule_of(self.trainer).stopping.agree(fault)  # the scale is the same on all ranks
        if self.skipped_steps.bit_count() == 1 and self.trainer.is_global_zero:
            log.warning(
                "the gradients of loss/%s overflowed at frame %d: the step was skipped (%d in all), and the loss scale "
                "is %g from now on",
                term,
                frames,
                self.skipped_steps,
                self._loss_scale,
            )
        return True

    def validation_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> None:
        """Log the evaluated episodes, of all ranks, of each selector; ``eval/return`` is the first one's."""
        frames = datamodule_of(self.trainer).progress.frames
        self.log("step", torch.tensor(frames, dtype=torch.float64))  # x-axis; float32 is exact to 2^24 only
        for prefix, episodes in zip(metric_prefixes(batch), batch.values(), strict=True):
            returns = episodes["return"]
            if not returns.isfinite().all():
                fault = TrainingFault(f"{prefix}/return is NaN or infinite after frame {frames}")
                datamodule_of(self.trainer).stopping.agree(fault)
            values = (returns.mean(), returns.std(correction=0), episodes["length"].mean())
            self.log_dict({f"{prefix}/{name}": v for name, v in zip(EVALUATED, values, strict=True)}, batch_size=1)

    def check_callbacks(self, trainer: Trainer, data: OffPolicyDataModule) -> None:
        """Raise :class:`SettingError` for one that cannot be, or whose ``monitor`` is a metric that nothing logs.

        Callbacks of the user's own may log others: beside one, no monitor is refused.
        """
        callbacks = cast("list[Callback]", trainer.callbacks)  # type: ignore[attr-defined]
        for kind, mend in AUTOMATIC.items():
            require(
                not any(isinstance(callback, kind) for callback in callbacks),
                f"trainer.callbacks has {kind.__name__}, which is for automatic optimization: {mend}",
            )
        if any(type(c).__module__.partition(".")[0] not in ("pytorch_lightning", "qsm_lightning") for c in callbacks):
            return
        logged = [f"{prefix}/{name}" for prefix in metric_prefixes(data.selectors_of(self.loss)) for name in EVALUATED]
        for callback in callbacks:
            monitor = getattr(callback, "monitor", None)
            require(
                monitor in (None, "step", *logged),
                f"trainer.callbacks: {type(callback).__name__}'s monitor is {monitor!r}, which is not logged; choose "
                f"from {', '.join(logged)}",
            )

    def on_train_start(self) -> None:
        datamodule_of(self.trainer).start()
        self.metrics = {name: value.to(self.device) for name, value in self.metrics.items()}
        if self.trainer.scaler is not None:
            self._loss_scale = self.trainer.scaler.get_scale()
        self._compiled = None
        if self.compiles(self.trainer, datamodule_of(self.trainer)):
            optimizers = [cast(Adam, optimizer) for optimizer in self.trainer.optimizers]
            clip = self._clip if self.gradient_clip_val is not None else None
            self._compiled = CompiledUpdate(
                self.loss, dict(zip(self.loss.terms, optimizers, strict=True)), self._follow, clip
            )

    def compiles(self, trainer: Trainer, data: OffPolicyDataModule) -> bool:
        """Whether updates are compiled.

        Raises:
            SettingError: when they cannot be and ``compile`` is true.
        """
        wanted = self.hparams["compile"]
        updates = exact_fraction(data.utd) * (data.total_frames - data.warm_up)
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if wanted is False or (wanted == "auto" and (updates < WORTHWHILE_UPDATES or not on_cpu)):
            return False
        reason = self._why_not_compiled(trainer)
        require(
            not reason or wanted == "auto",
            f"model.compile is true, but an update cannot be compiled: {reason}; use auto or false",
        )
        return not reason

    def _why_not_compiled(self, trainer: Trainer) -> str:
        """Why updates cannot be compiled; empty when they can."""
        name = type(self.loss).__name__
        if not vars(type(self.loss)).get("compilable", False):
            return f"{name} is not compilable, or does not say so"
        if trainer.precision == "64-true" and any(p.ndim == 0 and p.requires_grad for p in self.loss.parameters()):
            return f"torch's compiler loses the gradient of a scalar in float64, and {name} learns one"
        if type(self).configure_optimizers is not OffPolicyModule.configure_optimizers:
            return f"{type(self).__name__} has optimizers of its own"
        if trainer.world_size > 1:
            return f"{trainer.world_size} processes average their gradients in the middle of it"
        if trainer.scaler is not None:
            return "16-mixed looks at its gradients in the middle of it"
        return missing_for_compiling(trainer.strategy.root_device)

    def _clip(self, gradients: list[Tensor]) -> None:
        """As Lightning's ``clip_gradients``, for gradients that are not at their parameters."""
        limit = cast(float, self.gradient_clip_val)
        if self.gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(gradients, -limit)
            torch._foreach_clamp_max_(gradients, limit)
        else:
            norm = nn.utils.get_total_norm(gradients)
            torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.run_identity(self.trainer)
        data = datamodule_of(self.trainer)
        checkpoint["metrics"] = data.ranks.gather(self.metrics)
        checkpoint["skipped_steps"] = self.skipped_steps
        checkpoint["updates"] = self.updates
        checkpoint["compiled"] = self._last_compiled
        put_at_start_of_epoch(checkpoint["loops"]["fit_loop"], data.epochs, data.progress.batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        metrics = checkpoint["metrics"]
        of_ranks = metrics if isinstance(metrics, list) else [metrics]  # one process's alone before there were several
        trainer = self._trainer  # none in load_from_checkpoint
        self.metrics = of_ranks[trainer.global_rank if trainer and len(of_ranks) == trainer.world_size else 0]
        self.skipped_steps = checkpoint.get("skipped_steps", 0)  # absent in checkpoints from before there was a scaler
        self.updates = checkpoint.get("updates", 0)
        self._last_compiled = checkpoint.get("compiled")
        floats = (value for value in checkpoint["state_dict"].values() if value.is_floating_point())
        self.to(next(floats).dtype)  # Lightning converts to float64 only after it has loaded

    def run_identity(self, trainer: Trainer) -> dict[str, Any]:
        """What belongs to a run's identity besides the hyper-parameters."""
        return {
            "seed_everything": global_seed(),
            "trainer.precision": str(trainer.precision),
            "trainer.gradient_clip_val": self.gradient_clip_val,
            "trainer.gradient_clip_algorithm": self.gradient_clip_algorithm,
        }

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """Adam for every term of the loss: ``critic_lr`` for qvalue; ``actor_lr`` for others, or the rate that the loss
        has for a term. All but that of qvalue decay: what adapts to the denoiser has to stop with it.
        """
        rates = self.loss.learning_rates
        decay = self.hparams["actor_lr_decay_updates"]
        # a fused step takes a loss scale out itself, too late for clipping, and mixed precision then refuses to clip
        fused = self.gradient_clip_val is None or not isinstance(self.trainer.precision_plugin, MixedPrecision)

        def cosine(update: int) -> float:
            return 0.5 * (1 + math.cos(math.pi * min(update / decay, 1))) if decay else 1.0

        optimizers = {
            term: Adam(
                self.loss.term_parameters(term),
                rates.get(term, self.hparams["critic_lr"] if term == "qvalue" else self.hparams["actor_lr"]),
                fused=fused,
            )
            for term in self.loss.terms
        }
        for term in self.loss.every.keys() & optimizers.keys():
            optimizers[term]._opt_called = True  # type: ignore[attr-defined]  # schedules ask for a step before theirs
        decayed: list[LRScheduler] = [LambdaLR(o, cosine) for term, o in optimizers.items() if term != "qvalue"]
        return list(optimizers.values()), decayed

    # The average of the denoiser's weights.

    @property
    def _averaged(self) -> list[nn.Module]:
        """The modules that act."""
        return self.loss.term_modules("actor")

    def _update_averages(self) -> None:
        """average <- ema average + (1 - ema) online."""
        if self.hparams["ema"] is not None:
            for online, average in zip(self._averaged, self.averages, strict=True):
                polyak_update(online, average, 1 - self.hparams["ema"])

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the loss's policies act with the averaged weights, and afterwards with the trained ones again.

        Without ``ema`` it changes nothing.
        """
        self._swap_averages()
        try:
            yield
        finally:
            self._swap_averages()

    def _swap_averages(self) -> None:
        if self.hparams["ema"] is not None:
            for online, average in zip(self._averaged, self.averages, strict=True):
                for p, q in zip(online.parameters(), average.parameters(), strict=True):
                    p.data, q.data = q.data, p.data


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


def metric_prefixes(selectors: Iterable[str]) -> list[str]:
    """What the names of each selector's metrics begin with: ``eval`` for the first, ``eval_NAME`` for others."""
    return ["eval" if i == 0 else f"eval_{selector}" for i, selector in enumerate(selectors)]
