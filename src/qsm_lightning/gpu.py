"""Compiled functions on a GPU: fewer kernels, and one call, the replay of a CUDA graph, that starts them all.

A small update is a hundred and more products and fused loops of a few microseconds each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qsm_lightning.passes import THIN, ThinProducts

# For torch.compile. Kernels that do not depend on each other become one.
OPTIONS: dict[str, Any] = {
    "combo_kernels": True,
    "unroll_reductions_threshold": THIN,
    "post_grad_custom_pre_pass": ThinProducts(),
}


class Captured:
    """A function of arguments of one shape as a CUDA graph: all its kernels are started by one call, without waiting.

    The first call is the function's own, and is followed by the capture, which computes nothing; from then on the graph
    is replayed. What is returned is overwritten by the next call. Shapes and types are not checked.

    tensordict's ``CudaGraphModule`` does the same, but has the host wait for the device before each replay.

    Args:
        function: of a tensor, or of a TensorDict of tensors, on a CUDA device; nothing in it waits for the device.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        # the graph's argument, by type: torch copies several tensors of one type by one kernel
        self._kept: defaultdict[torch.dtype, dict[Any, Tensor]] = defaultdict(dict)

    def __call__(self, argument: Any) -> Any:
        if self._graph is None:
            return self._capture(argument)
        for kept in self._kept.values():
            torch._foreach_copy_(list(kept.values()), [argument[key] if key else argument for key in kept])
        self._graph.replay()
        return self._out

    def _capture(self, argument: Any) -> Any:
        aside = torch.cuda.Stream()  # as capturing asks of the calls before it
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            out = self.function(argument)
        torch.cuda.current_stream().wait_stream(aside)
        own, graph = argument.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._out = self.function(own)
        self._graph = graph
        for key, tensor in [((), own)] if isinstance(own, Tensor) else own.items(include_nested=True, leaves_only=True):
            self._kept[tensor.dtype][key] = tensor
        return out
