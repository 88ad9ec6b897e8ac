"""What compiled functions have besides on a GPU: few kernels, and one call that starts them all.

An update is a hundred and more products and fused loops of a few microseconds each: what it takes is their number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.pattern_matcher import Arg, CallFunction, Match, PatternMatcherPass, register_graph_pattern

from qsm_lightning.compiled import NoiseInOrder

aten = torch.ops.aten

THIN = 16  # at most: the shortest side of a product that is not worth a kernel of its own
SMALL = 4_000_000  # at most: its multiplications, beyond which torch's own products are faster


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` [M, K] times ``right`` [K, N], as ``torch.mm``: what the compiler makes part of the loops around it."""
    return (left[:, :, None] * right).sum(1)


class ThinProducts(NoiseInOrder):
    """Has torch's compiler compute products of thin matrices, such as with actions, by :func:`thin_product`.

    Each spares one or two kernels. Sums are in the precision of their factors: TF32 is for the other products.
    """

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        _thin_products.apply(graph)

    def uuid(self) -> Any:
        return super().uuid() + get_hash_for_files((__file__,))


def _is_thin(match: Match) -> bool:
    left, right = (node.meta["val"] for node in match.args[-2:])
    (m, k), n = left.shape, right.shape[1]
    return min(m, k, n) <= THIN and m * k * n <= SMALL and not match.output_node().kwargs


_thin_products = PatternMatcherPass(pass_name="thin_products")


@register_graph_pattern(CallFunction(aten.mm.default, Arg(), Arg()), extra_check=_is_thin, pass_dict=_thin_products)
def _replace(match: Match, left: fx.Node, right: fx.Node) -> None:
    match.replace_by_example(thin_product, [left, right])


@register_graph_pattern(
    CallFunction(aten.addmm.default, Arg(), Arg(), Arg()), extra_check=_is_thin, pass_dict=_thin_products
)
def _replace_added(match: Match, bias: fx.Node, left: fx.Node, right: fx.Node) -> None:
    match.replace_by_example(lambda bias, left, right: bias + thin_product(left, right), [bias, left, right])


class Captured:
    """A function of arguments of one shape as a CUDA graph: all its kernels are started by one call, without waiting.

    The first call is the function's own, and is followed by the capture, which computes nothing; from then on the graph
    is replayed. What is returned is overwritten by the next call.

    tensordict's ``CudaGraphModule`` does the same, but has the host wait for the device before each replay.

    Args:
        function: of a tensor, or of a TensorDict of tensors, on a CUDA device; nothing in it waits for the device.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, argument: Any) -> Any:
        if self._graph is None:
            return self._capture(argument)
        for keys, kept in self._kept:  # by type, as torch copies several tensors of one type by one kernel
            torch._foreach_copy_(kept, [argument] if keys is None else [argument[key] for key in keys])
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
        self._graph, self._kept = graph, _by_type(own)
        return out


def _by_type(argument: Tensor | TensorDictBase) -> list[tuple[list[Any] | None, list[Tensor]]]:
    """The tensors of an argument, and under which keys they are in it, those of one type together."""
    if isinstance(argument, Tensor):
        return [(None, [argument])]
    leaves = list(argument.items(include_nested=True, leaves_only=True))
    types = {leaf.dtype for _, leaf in leaves}
    return [
        ([key for key, leaf in leaves if leaf.dtype == dtype], [leaf for _, leaf in leaves if leaf.dtype == dtype])
        for dtype in types
    ]


# For torch.compile. Kernels that do not depend on each other become one.
OPTIONS: dict[str, Any] = {
    "combo_kernels": True,
    "unroll_reductions_threshold": THIN,
    "post_grad_custom_pre_pass": ThinProducts(),
}
