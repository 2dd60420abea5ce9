"""Programs as people read them: typed operations in order, each with the module and the line that it came from."""

from __future__ import annotations

import pytest
import torch
from paged_model import Model as Paged
from paged_model import Traffic
from torch import nn

import pcg_compile as pcg
from pcg_compile.registry import runtimes

LAYERS = 3


@pcg.split_op("programs::between")
def between(x: torch.Tensor) -> torch.Tensor:
    return x * 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.ops.programs.between(self.linear(x).relu())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x + 1


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch.manual_seed(0)


def programs_of(model, inputs, **options):
    """The program of each input, by its number of rows, after a call that equals eager's."""
    options = {"compiler": "eager", "buckets": [4, 8], **options}
    compiled = torch.compile(model, backend="pcg", options=options, dynamic=True)
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(compiled(x), model(x))
    (runtime,) = runtimes(compiled)
    return {sizes[0]: program for binding in runtime.bindings for sizes, program in binding.steps.items()}


def kinds(program):
    return [type(operation).__name__ for operation in program.operations]


def test_a_bucket_is_loads_replays_split_ops_and_outputs():
    programs = programs_of(Model(), [torch.randn(n, 4) for n in (3, 4)])
    layer = ["Replay", "RunSplitOp"]
    assert kinds(programs[4]) == ["Load", *layer * LAYERS, "Replay", "Emit"]
    # The padding of what a split op gave repeats row 0.
    assert kinds(programs[3]) == ["Load", *[*layer, "RepeatRowZero"] * LAYERS, "Replay", "Emit"]


def test_beyond_the_largest_bucket_values_go_after_their_last_reader():
    (program,) = programs_of(Model(), [torch.randn(9, 4)]).values()
    assert program.bucket is None and program.replays == 0
    layer = ["RunPiece", "Free", "RunSplitOp", "Free"]
    assert kinds(program) == ["Load", *layer * LAYERS, "RunPiece", "Free", "Emit"]


def test_each_operation_names_its_module_and_line():
    program = programs_of(Model(), [torch.randn(5, 4)], buckets=[5])[5]
    split_ops = [operation for operation in program.operations if type(operation).__name__ == "RunSplitOp"]
    assert [operation.module for operation in split_ops] == [f"layers.{i}" for i in range(LAYERS)]
    line = Layer.forward.__code__.co_firstlineno + 1
    assert all(operation.where.startswith(f"{__file__}:{line}") for operation in split_ops)
    printed = str(program).splitlines()
    assert printed[0] == f"program of sizes (5,) in bucket (5,): {LAYERS + 1} replays"
    assert len(printed) == 1 + len(program.operations)
    assert printed[2].split()[:4] == ["1", "Replay", "piece", "0"] and "layers.0.linear" in printed[2]
    assert "programs::between" in printed[3] and __file__ in printed[3]


def test_programs_of_a_bucket_share_what_lies_between_inputs_and_outputs():
    programs = programs_of(lambda x: x.relu() + 1, [torch.randn(n, 4) for n in (3, 2, 4)])
    assert programs[3].body is programs[2].body is programs[4].body
    assert programs[3].loads != programs[2].loads


def test_a_full_graph_is_one_replay_in_place_of_the_others():
    model, traffic = Paged().eval(), Traffic()
    options = {"compiler": "eager", "buckets": [8], "cudagraph_mode": "full"}
    compiled = pcg.piecewise(dynamic={"ids": 0, "positions": 0}, **options)(model.forward)
    for request in (1, 2):
        traffic.check(model, compiled, {request: 5})
    (runtime,) = runtimes(compiled)
    (program,) = (program for binding in runtime.bindings for program in binding.steps.values())
    assert program.replays > 1 and "one Replay of the full CUDA graph" in str(program)
    batch = traffic.batch({3: 5})
    with pcg.step(batch, traffic.caches[1]):
        of_step = [type(operation).__name__ for operation in program.operations_of_step()]
    assert of_step[-3:] == ["PrepareMetadata", "Replay", "Emit"] and of_step.count("Replay") == 1
