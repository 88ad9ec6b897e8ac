"""Numerical precision: the kinds that are offered, and what is computed in full under any of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from qsm_lightning.errors import require

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}

Method = TypeVar("Method", bound=Callable[..., Any])


def precision_name(precision: str | int | None) -> str:
    """The full name of a ``trainer.precision``: 32-true for null and for 32."""
    return SHORT.get(str(precision), str(precision or "32-true"))


def check_precision(precision: str | int | None, accelerator: Any) -> None:
    """Refuse a ``trainer.precision`` that cannot be used with ``trainer.accelerator`` here.

    Raises:
        SettingError: for a precision that is not offered, and for 16-mixed without a GPU.
    """
    name = precision_name(precision)
    require(name in PRECISIONS, f"trainer.precision is {precision!r}: choose {', '.join(PRECISIONS[:-1])} or 16-mixed")
    gpu = accelerator != "cpu" and torch.cuda.is_available()
    require(
        name != "16-mixed" or gpu, f"trainer.precision is {precision!r}, which needs a GPU: use bf16-mixed on a CPU"
    )


def full_precision_on(device: str) -> AbstractContextManager[None]:
    """Within it, nothing is computed on a type of device (cpu, cuda) in lower precision than its tensors'."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def full_precision(method: Method) -> Method:
    """Compute a method in the precision of its tensors, also where autocast would lower it.

    Its first argument after ``self`` is a tensor. What it is given must be in that precision already, as observations,
    actions and parameters are.
    """

    @wraps(method)
    def full(self: Any, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with full_precision_on(first.device.type):
            return method(self, first, *args, **kwargs)

    return cast(Method, full)
