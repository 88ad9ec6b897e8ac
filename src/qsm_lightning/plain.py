"""Python and NumPy state as what a checkpoint may hold: tensors, numbers, strings and containers of them."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch


class NotPlainError(TypeError):
    """An object whose state is not known."""


def encode(value: Any) -> Any:
    """``value`` in a form that loads with ``weights_only=True``; :func:`decode` gives it back, types included.

    Knows numbers, strings, arrays, NumPy scalars and generators, and lists, tuples, deques and dictionaries of these.

    Raises:
        NotPlainError: for anything else.
    """
    match value:
        case None | bool() | int() | float() | str() | bytes() if not isinstance(value, np.generic):
            return value
        case torch.Tensor():
            return ("tensor", value.detach().clone())
        case np.ndarray() | np.generic() if value.dtype.kind in "biufc":
            array = np.array(value, order="C")
            return ("array" if isinstance(value, np.ndarray) else "scalar", torch.from_numpy(array))
        case np.random.Generator():
            return ("generator", encode(value.bit_generator.state))
        case np.random.RandomState():
            return ("random_state", encode(value.get_state(legacy=False)))
        case list() | tuple() if type(value) in (list, tuple):
            return (type(value).__name__, [encode(item) for item in value])
        case deque():
            return ("deque", [value.maxlen, *map(encode, value)])
        case dict():
            return ("dict", [(encode(key), encode(item)) for key, item in value.items()])
    raise NotPlainError(type(value).__name__)


def decode(value: Any, current: Any = None) -> Any:
    """The inverse of :func:`encode`; a generator's state goes into ``current``, the generator that is there now."""
    if not isinstance(value, tuple):
        return value
    kind, content = value
    match kind:
        case "tensor":
            return content.clone()
        case "array":
            return content.numpy().copy()
        case "scalar":
            return content.numpy()[()]
        case "generator":
            current.bit_generator.state = decode(content)
            return current
        case "random_state":
            current.set_state(decode(content))
            return current
        case "list":
            return [decode(item) for item in content]
        case "tuple":
            return tuple(decode(item) for item in content)
        case "deque":
            return deque(map(decode, content[1:]), content[0])
        case "dict":
            return {decode(key): decode(item) for key, item in content}
    raise ValueError(f"unknown kind {kind!r}")


def generators_state() -> dict[str, Any]:
    """The state of the global generators of Python, NumPy and torch, on the CPU and on every CUDA device."""
    return {
        "python": random.getstate(),
        "numpy": encode(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def load_generators_state(state: dict[str, Any]) -> None:
    """Continue the global generators from :func:`generators_state`; CUDA's only where there are as many devices."""
    random.setstate(state["python"])
    np.random.set_state(decode(state["numpy"]))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
