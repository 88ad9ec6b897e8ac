"""Passes over the graphs of torch's compiler: noise drawn in the order it is written, thin products in loops."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import Arg, CallFunction, Match, PatternMatcherPass, register_graph_pattern
from torch._ops import OpOverload

aten = torch.ops.aten

THIN = 16  # at most: the shortest side of a product that is not worth a kernel of its own
SMALL = 4_000_000  # at most: its multiplications; not tuned


class NoiseInOrder(CustomGraphPass):
    """Has torch's compiler draw noise first, in the order in which it is written, as far as it depends on nothing.

    Where loops are fused, and some versions of torch beforehand, it would be drawn in the order in which it is used.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for like in graph.find_nodes(op="call_function", target=aten.randn_like.default):
            value = like.meta["val"]
            if value.is_contiguous():  # depends on what it is like by shape alone
                like.target, like.args = aten.randn.default, (list(value.shape),)
                like.kwargs = {"dtype": value.dtype, "device": value.device}
        *_, last_input = graph.find_nodes(op="placeholder")
        drawn = filter(_draws, graph.nodes)
        for node in reversed(list(takewhile(lambda node: not node.all_input_nodes, drawn))):
            last_input.append(node)

    def uuid(self) -> Any:
        """What compiled code on disk is known by."""
        return get_hash_for_files((__file__,), type(self).__name__)


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def thin_product(left: Tensor, right: Tensor) -> Tensor:
    """``left`` [M, K] times ``right`` [K, N], as ``torch.mm``: what the compiler makes part of the loops around it."""
    return (left[:, :, None] * right).sum(1)


class ThinProducts(NoiseInOrder):
    """Also has it compute products of thin matrices, such as with actions, by :func:`thin_product`.

    On a GPU each spares one or two kernels. TF32 is for the other products.
    """

    def __call__(self, graph: fx.Graph) -> None:
        super().__call__(graph)
        _thin_products.apply(graph)


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
