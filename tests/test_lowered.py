"""The graph over plain tensors of a model in parts: custom ops write in place again, idle views are gone."""

from __future__ import annotations

import operator

import torch
from torch import fx

from pcg_compile.distributed.lowering import drop_idle_views, write_in_place


@torch.library.custom_op("test_lowered::add_row_sum", mutates_args=("y",))
def add_row_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.add_(x.sum(-1, keepdim=True))
    return y.sum(-1)


@add_row_sum.register_fake
def _(x, y):
    return x.new_empty(x.shape[:-1])


def graph_of(made):
    """What AOTAutograd writes for ``y = made(x)``, where add_row_sum returns something and is given a copy."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    y, read = made(graph, x)
    op = torch.ops.test_lowered.add_row_sum.default
    both = graph.call_function(torch.ops.higher_order.auto_functionalized, (op,), {"x": x, "y": y})
    results = [graph.call_function(operator.getitem, (both, i)) for i in range(2)]
    graph.output((*results, *read))
    return fx.GraphModule({}, graph)


def test_ops_write_what_was_made_for_them_and_copies_of_the_rest():
    aten = torch.ops.aten

    def product(graph, x):
        return graph.call_function(aten.mm.default, (x, x)), ()

    def view_of_product(graph, x):
        return graph.call_function(aten.view.default, (product(graph, x)[0], [3, 3])), ()

    def read_again(graph, x):
        y = product(graph, x)[0]
        return y, (y,)

    def read_as_well(graph, x):
        y = product(graph, x)[0]
        return graph.call_function(aten.view.default, (y, [3, 3])), (y,)

    def an_input(graph, x):
        return x, ()

    cases = [(product, 0), (view_of_product, 0), (read_again, 1), (read_as_well, 1), (an_input, 1)]
    for made, copies in cases:
        gm, plain = graph_of(made), graph_of(made)
        write_in_place(gm)
        targets = [node.target for node in gm.graph.nodes]
        assert torch.ops.higher_order.auto_functionalized not in targets
        assert targets.count(aten.clone.default) == copies, made
        x = torch.randn(3, 3)
        for got, want in zip(gm(x.clone()), plain(x.clone()), strict=True):
            torch.testing.assert_close(got, want)


def test_views_of_the_same_shape_are_dropped():
    graph = fx.Graph()
    x = graph.placeholder("x")
    same, other = (graph.call_function(torch.ops.aten.view.default, (x, shape)) for shape in ([2, 3], [6]))
    used = graph.call_function(torch.ops.aten.relu.default, (same,))
    for node, shape in ((x, (2, 3)), (same, (2, 3)), (other, (6,)), (used, (2, 3))):
        node.meta["val"] = torch.empty(shape)
    graph.output((used, other))
    gm = fx.GraphModule({}, graph)
    drop_idle_views(gm)
    assert used.args == (x,) and sum(n.target is torch.ops.aten.view.default for n in gm.graph.nodes) == 1
