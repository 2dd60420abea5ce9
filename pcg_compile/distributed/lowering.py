"""Models split over several processes: tensor subclasses are lowered, and collectives captured where they can be."""

from __future__ import annotations

import atexit
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ..fx.node_facts import NodeFacts, OpCall
from ..fx.plan import Item, SplitOpItem
from ..fx.sizes import expr_of
from ..registry import runtimes
from ..torch_compat.process_groups import group_backend, ranks_of_group
from ..torch_compat.subclasses import functionalized_call, is_subclass, lower_subclasses
from .agreement import Agreement, release_channels

__all__ = [
    "agreement_of",
    "collective_outside_captures",
    "first_collective",
    "has_subclasses",
    "lowered",
    "release_at_exit",
    "release_collectives",
]

#: Ops whose result is their argument in another shape.
_VIEWS = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional", "c10d")


def has_subclasses(inputs: Sequence[Any]) -> bool:
    """Whether an input is made of other tensors: a DTensor of a parallelized model, a quantized weight."""
    return any(is_subclass(value) for value in inputs)


def lowered(
    gm: fx.GraphModule, inputs: Sequence[Any], compile_plain: Callable[[fx.GraphModule, Sequence[Any]], Any]
) -> Callable[..., Any]:
    """Compiles a graph with such inputs by its graph over the plain tensors that they are made of.

    AOTAutograd writes that graph, and takes the inputs apart at each call; for a DTensor it holds each rank's own part
    and the collectives between them.
    """

    def compile_lowered(plain: fx.GraphModule, fakes: Sequence[Any]) -> Any:
        write_in_place(plain)
        drop_idle_views(plain)
        return compile_plain(plain, fakes)

    return lower_subclasses(gm, list(inputs), compile_lowered)


def write_in_place(gm: fx.GraphModule) -> None:
    """Has custom ops write what they are given again, as a LoRA layer writes the product that it adds to.

    AOTAutograd has them work on copies, in nodes that hold the op. A copy is left out where what is written was made
    for the op, by nodes that nobody else uses.
    """
    for node in gm.graph.nodes:
        call = functionalized_call(node)
        if call is None:
            continue
        op, given = call[0], dict(call[1])
        written = [arg.name for arg in op._schema.arguments if arg.alias_info is not None and arg.alias_info.is_write]
        plain = all(isinstance(given.get(name), fx.Node) for name in written)
        if not plain or any(user.target is not operator.getitem for user in node.users):
            continue
        with gm.graph.inserting_before(node):
            for name in written:
                if not _made_for(node, given[name]):
                    given[name] = _copy_meta(gm.graph.call_function(torch.ops.aten.clone.default, (given[name],)), node)
            result = _copy_meta(gm.graph.call_function(op, (), given), node)
            _replace_results(node, result, len(op._schema.returns), [given[name] for name in written])
    gm.graph.lint()
    gm.recompile()


def drop_idle_views(gm: fx.GraphModule) -> None:
    """Takes out views of the same shape: each layer that makes a DTensor of x has one, and hides that it reads x."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        viewed = node.args[0]
        assert isinstance(viewed, fx.Node)
        if _shape(node) == _shape(viewed) and not any(user.op == "output" for user in node.users):
            node.replace_all_uses_with(viewed)
            gm.graph.erase_node(node)
    gm.recompile()


def _shape(node: fx.Node) -> list[Any]:
    return [expr_of(size) for size in node.meta["val"].shape]


def _made_for(node: fx.Node, value: fx.Node) -> bool:
    """Whether a tensor has memory of its own that nothing but ``node`` reads, and once."""
    if node.all_input_nodes.count(value) != 1 or list(node.kwargs.values()).count(value) != 1:
        return False
    user = node
    while list(value.users) == [user]:
        if not isinstance(value.target, torch._ops.OpOverload) or value.target.namespace != "aten":
            return False
        if value.target not in _VIEWS:
            return all(returned.alias_info is None for returned in value.target._schema.returns)
        user, value = value, value.args[0]  # type: ignore[assignment]
    return False


def _replace_results(node: fx.Node, result: fx.Node, returns: int, written: Sequence[fx.Node]) -> None:
    """Gives the users of a node that holds an op what the op returns (``returns`` values), and what it wrote."""
    first = max(1, returns)
    for user in list(node.users):
        position = user.args[1]
        assert isinstance(position, int)
        if position >= first:
            user.replace_all_uses_with(written[position - first])
        elif returns > 1:
            user.args = (result, position)
            continue
        else:
            user.replace_all_uses_with(result)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _copy_meta(new: fx.Node, like: fx.Node) -> fx.Node:
    """Where the user finds a node that takes the place of another."""
    new.stack_trace = like.stack_trace
    new.meta.update({key: like.meta[key] for key in ("nn_module_stack", "source_fn_stack") if key in like.meta})
    return new


def agreement_of(facts: Mapping[fx.Node, NodeFacts]) -> Agreement | None:
    """How the ranks of a graph with collectives agree, those of its collectives' groups; None for a graph without."""
    calls = [call for fact in facts.values() for call in fact.ops if is_collective(call)]
    if not calls:
        return None
    names = dict.fromkeys(arg for call in calls for arg in call.args if isinstance(arg, str))
    groups = [ranks for ranks in map(ranks_of_group, names) if ranks is not None]
    # An op that has no name of a group: of any rank.
    return Agreement(groups or [range(torch.distributed.get_world_size())])


def first_collective(items: Sequence[Item], facts: Mapping[fx.Node, NodeFacts]) -> int:
    """The place of the first item that talks to other ranks; 0 where none is found."""
    for item in items:
        if isinstance(item, SplitOpItem):
            found = any(map(is_collective, facts[item.node].ops))
        else:
            targets = (node.target for node in item.piece.graph.nodes)
            found = any(isinstance(t, torch._ops.OpOverload) and t.namespace in _NAMESPACES for t in targets)
        if found:
            return item.index
    return 0


def is_collective(call: OpCall) -> bool:
    """Whether an op talks to other ranks, or waits for them."""
    return isinstance(call.op, torch._ops.OpOverload) and call.op.namespace in _NAMESPACES


def collective_outside_captures(node: fx.Node, facts: NodeFacts | None) -> str | None:
    """Why a collective runs between pieces: only NCCL's can be captured. None for what is no collective, or NCCL's."""
    for call in facts.ops if facts else ():
        if not is_collective(call):
            continue
        backend = next((group_backend(arg) for arg in reversed(node.args) if isinstance(arg, str)), None)
        if backend is None:
            # wait_tensor, which names no group.
            tensors = [a for a in call.args if isinstance(a, torch.Tensor)]
            backend = "nccl" if tensors and tensors[0].device.type == "cuda" else "gloo"
        if backend != "nccl":
            return f"{call.op} runs on {backend}, whose collectives no captured graph can hold"
    return None


def release_collectives() -> None:
    """Drops the captured graphs that may hold collectives. Call it ahead of ``dist.destroy_process_group()``.

    NCCL waits in ``ncclCommDestroy`` until every CUDA graph that holds one of its collectives is gone
    (pytorch/pytorch#115388), so destroying a process group that captured graphs still use never returns. Statistics
    stay; a later step captures again. pcg calls this when Python exits; a program that leaves its process groups to
    the exit need not. No captured graph may be running: every rank calls it between two steps.
    """
    for runtime in runtimes():
        if runtime.shared.agreement is not None:
            runtime.release()
    release_channels()


def release_at_exit() -> None:
    """Has :func:`release_collectives` called when Python exits, ahead of exit handlers registered so far."""
    atexit.unregister(release_collectives)
    atexit.register(release_collectives)
