"""The option cudagraph_mode, and what the name that it had before says."""

import pytest
import torch

import pcg_compile as pcg
from pcg_compile.options import Options


@pytest.mark.parametrize("mode", ["auto", "piecewise", "full"])
def test_allowed_modes(mode):
    assert Options.parse({"cudagraph_mode": mode}).cudagraph_mode == mode


@pytest.mark.parametrize("mode", ["eager", "captured", "FULL", "", None, True, 1, ["full"]])
def test_other_modes_are_errors(mode):
    with pytest.raises(pcg.errors.OptionsError) as raised:
        Options.parse({"cudagraph_mode": mode})
    text = str(raised.value)
    assert "'cudagraph_mode'" in text and repr(mode) in text and "'auto' or 'piecewise' or 'full'" in text


@pytest.mark.parametrize(
    ("before", "now"),
    [("auto", "auto"), ("eager", "piecewise"), ("captured", "full"), ("other", "auto"), (None, "auto"), ([], "auto")],
)
def test_the_former_name_is_an_error_whose_cure_works(before, now):
    with pytest.raises(pcg.errors.OptionsError) as raised:
        pcg.piecewise(attention=before)
    text = str(raised.value)
    assert "'attention'" in text and "It is called 'cudagraph_mode' now." in text
    line = next(line for line in text.splitlines() if "Write: " in line)
    options = eval(line.partition("options=")[2].removesuffix(")"))
    assert Options.parse(options).cudagraph_mode == now


def test_the_former_name_in_torch_compile():
    compiled = torch.compile(torch.nn.Linear(2, 2), backend="pcg", options={"attention": "captured"})
    with torch.no_grad(), pytest.raises(Exception, match="It is called 'cudagraph_mode' now"):
        compiled(torch.ones(3, 2))
