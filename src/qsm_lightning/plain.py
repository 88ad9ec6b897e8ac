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
    if type(value) in (type(None), bool, int, float, str, bytes):
        return value
    if type(value) in (list, tuple):
        return (type(value).__name__, [encode(item) for item in value])
    if type(value) is deque:
        return ("deque", [value.maxlen, *map(encode, value)])
    if type(value) is dict:
        return ("dict", [(encode(key), encode(item)) for key, item in value.items()])
    if isinstance(value, torch.Tensor):
        return ("tensor", value.detach().clone())
    if type(value) is np.random.Generator:
        return ("generator", encode(value.bit_generator.state))
    if type(value) is np.random.RandomState:
        return ("random_state", encode(value.get_state(legacy=False)))
    if type(value) is np.ndarray or isinstance(value, np.generic):
        try:
            kind = "array" if isinstance(value, np.ndarray) else "scalar"
            return (kind, torch.from_numpy(np.array(value, order="C")))
        except (TypeError, ValueError) as error:
            raise NotPlainError(f"{value.dtype} array") from error
    raise NotPlainError(type(value).__name__)


def decode(value: Any, current: Any = None) -> Any:
    """The inverse of :func:`encode`; generators go on in those that stand in ``current``'s place, or in new ones."""
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
            state = decode(content)
            if not _runs(current, state["bit_generator"]):
                current = np.random.Generator(getattr(np.random, state["bit_generator"])())
            current.bit_generator.state = state
            return current
        case "random_state":
            current = current if type(current) is np.random.RandomState else np.random.RandomState()
            current.set_state(decode(content))
            return current
        case "list" | "tuple":
            there = current if type(current) in (list, tuple) else []
            items = [decode(item, there[i] if i < len(there) else None) for i, item in enumerate(content)]
            return items if kind == "list" else tuple(items)
        case "deque":
            return deque(map(decode, content[1:]), content[0])
        case "dict":
            there = current if type(current) is dict else {}
            pairs = ((decode(key), item) for key, item in content)
            return {key: decode(item, there.get(key)) for key, item in pairs}
    raise ValueError(f"unknown kind {kind!r}")


def _runs(generator: Any, algorithm: str) -> bool:
    return type(generator) is np.random.Generator and type(generator.bit_generator).__name__ == algorithm


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
