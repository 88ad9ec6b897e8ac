"""Whole gradient updates, and actions, as compiled functions: the arithmetic of the plain ones, which they replace.

torch.compile fuses what is between the matrix products, and spares autograd, the optimizers and Python their
bookkeeping. What it makes is kept on disk and used again by later runs of the same shapes.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn.functional_modules import _exclude_td_from_pytree
from torch import Tensor
from torch.optim import Adam
from torch.utils._triton import has_triton

from qsm_lightning.errors import first_line
from qsm_lightning.losses import OffPolicyLoss
from qsm_lightning.policy import Policy

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
Due = tuple[str, ...]  # what an update steps: terms, and targets

WORTHWHILE_UPDATES = 20_000  # compiling costs as long as some 5,000 updates save


def missing_for_compiling(device: torch.device = CPU) -> str:
    """What this machine lacks to compile an update on a device; empty when it lacks nothing."""
    if not can_trace_gradients():
        return f"torch {torch.__version__} cannot compile a whole update"
    if device.type == "cuda" and not has_triton():
        return "there is no Triton for this GPU"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # InvalidCxxCompiler, which torch does not export
        return f"there is no C++ compiler ({error})"
    return ""


def compiled(function: Callable[[Any], Any], device: torch.device = CPU) -> Callable[[Any], Any]:
    """``function`` of one argument, whose tensors always have the same shapes, as one graph.

    Networks, optimizers and whatever else it reads must stay what they are, but for the content of their tensors: of
    torch's checks before each call those of the argument alone stay. On a GPU what is returned is overwritten by the
    next call (:class:`~qsm_lightning.gpu.Captured`).

    Args:
        function: what to compile.
        device: where all its tensors are.
    """

    from qsm_lightning import gpu, passes  # which take a second, of torch's compiler

    def call(batch: Any) -> Any:
        return function(batch)

    # torch remembers what it compiled by code object, and the checks that are left out would tell two functions apart
    own = FunctionType(call.__code__.replace(), call.__globals__, call.__name__, None, call.__closure__)
    options: dict[str, Any] = {
        "fallback_random": True,  # torch's generator, as everywhere else: the same noise, and exact resuming
        "post_grad_custom_pre_pass": passes.NoiseInOrder(),
        "reorder_for_locality": False,  # which changes the order before that sees it, as the next does afterwards
        "reorder_for_peak_memory": False,
        "guard_filter_fn": lambda guards: [guard.name.startswith("batch") for guard in guards],
    }
    if device.type != "cuda":
        return torch.compile(own, fullgraph=True, dynamic=False, options=options)
    return gpu.Captured(torch.compile(own, fullgraph=True, dynamic=False, options=options | gpu.OPTIONS))


def compile_acting(policy: Policy, device: torch.device = CPU) -> None:
    """Have ``policy`` compute its actions by a compiled function, or as before where that cannot be made.

    Args:
        policy: what acts.
        device: where it will act; anywhere else, as before its networks are moved there, it acts as before.
    """
    plain = policy.act
    fast = compiled(plain, device)

    def act(observation: Tensor) -> Tensor:
        if observation.device != device:
            return plain(observation)
        try:
            return fast(observation)
        except torch._dynamo.exc.TorchDynamoException as error:
            log.warning("%s cannot be compiled (%s): it acts more slowly", type(policy).__name__, first_line(error))
            policy.act = plain  # type: ignore[method-assign]
            return plain(observation)

    policy.act = act  # type: ignore[method-assign]


def can_trace_gradients() -> bool:
    """Whether this torch compiles a backward pass with what comes after it."""
    return hasattr(torch._dynamo.config, "trace_autograd_ops")


class CompiledAdam:
    """The arithmetic of torch's Adam as part of a compiled function, on the state of an optimizer.

    torch's own form for compiling takes powers of beta in float32, which is off by 3e-5 in the first steps, and has a
    dozen operations on numbers for every parameter. Here what depends on the step is computed once, in Python.

    Args:
        optimizer: keeps the state; its ``state_dict`` has the number of steps right.
    """

    def __init__(self, optimizer: Adam) -> None:
        self.group = optimizer.param_groups[0]
        self.parameters: list[Tensor] = self.group["params"]
        for p in self.parameters:
            if not optimizer.state[p]:
                optimizer.state[p] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p)}
                optimizer.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        states = [optimizer.state[p] for p in self.parameters]
        self.means, self.squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        self.steps = [state["step"] for state in states]
        self.before, self.done = int(self.steps[0].item()), 0
        self.rate, self.root = self.parameters[0].new_zeros(2).unbind()  # as numbers they would be compiled in
        optimizer.register_state_dict_pre_hook(self._write_steps)
        optimizer._opt_called = True  # type: ignore[attr-defined]  # learning rate schedules ask for a step before theirs

    def prepare(self) -> None:
        """Set what the next step depends on besides gradients."""
        step, (beta1, beta2) = self.before + self.done + 1, self.group["betas"]
        self.rate.fill_(self.group["lr"] / (1 - beta1**step))
        self.root.fill_(math.sqrt(1 - beta2**step))

    def step(self, gradients: list[Tensor]) -> None:
        """Compiled: p <- p - rate m / (sqrt(v) / root + eps), in place."""
        beta1, beta2 = self.group["betas"]
        for p, g, mean, square in zip(self.parameters, gradients, self.means, self.squares, strict=True):
            mean.lerp_(g, 1 - beta1)
            square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.sub_(self.rate * mean / (square.sqrt() / self.root + self.group["eps"]))

    def release(self) -> None:
        """Let the optimizer count its steps again."""
        self._write_steps(None)
        self.before, self.done = self.before + self.done, 0

    def _write_steps(self, _: Any) -> None:
        if self.done:
            for step in self.steps:
                step.fill_(self.before + self.done)


class CompiledUpdate:
    """Steps the optimizers of the terms that are due, in the loss's order, then what follows, by one call.

    Optimizers keep their state where it is: checkpoints are those of the plain update, and either goes on with the
    other's. Where some terms are not due at every update, each selection of them is a function of its own. On a GPU
    each is captured as a graph.

    Args:
        loss: the algorithm.
        optimizers: the optimizer of each term.
        follow: what is done after the last step, given what is due: targets, averages.
        clip: changes a term's gradients before its step.
    """

    def __init__(
        self,
        loss: OffPolicyLoss,
        optimizers: Mapping[str, Adam],
        follow: Callable[[Due], None],
        clip: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self.loss, self.follow, self.clip = loss, follow, clip
        self.adams = {term: CompiledAdam(optimizer) for term, optimizer in optimizers.items()}
        self._compiled: dict[Due, Callable[[TensorDictBase], dict[str, Tensor]]] = {}

    def __call__(self, minibatch: TensorDictBase, due: Due | None = None) -> dict[str, Tensor]:
        """One update on a replay batch [B]; returns losses and metrics under the names they are logged by.

        Args:
            minibatch: the replay batch.
            due: what to step; everything by default.

        Raises:
            TorchDynamoException: when it cannot be compiled, before anything is computed.
        """
        due = (*self.adams, "targets") if due is None else due
        stepped = [adam for term, adam in self.adams.items() if term in due]
        for adam in stepped:
            adam.prepare()
        with _exclude_td_from_pytree():  # as TorchRL's losses do, but inside of what is compiled
            if due in self._compiled:
                out = self._compiled[due](minibatch)
            else:
                made = compiled(partial(self._update, due), next(self.loss.parameters()).device)
                with torch._dynamo.config.patch(trace_autograd_ops=True), warnings.catch_warnings():  # while it is made
                    warnings.filterwarnings("ignore", module="tensordict")  # of what it does differently then
                    out = made(minibatch)
                self._compiled[due] = made
        for adam in stepped:
            adam.done += 1
        return out

    def release(self) -> None:
        """Hand the optimizers back: the plain update goes on with them."""
        for adam in self.adams.values():
            adam.release()

    def _update(self, due: Due, batch: TensorDictBase) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for term, adam in self.adams.items():
            if term not in due:
                continue
            loss, metrics = self.loss.term_loss(term, batch)
            with torch.autocast(loss.device.type, enabled=False):  # as OffPolicyModule.backward
                gradients = list(torch.autograd.grad(loss, adam.parameters))
            with torch.no_grad():
                if self.clip is not None:
                    self.clip(gradients)
                adam.step(gradients)
            out |= {f"loss/{term}": loss.detach(), **{f"update/{name}": value for name, value in metrics.items()}}
        self.follow(due)
        return out
