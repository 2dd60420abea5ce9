"""Every notebook runs from top to bottom, draws its pictures, and says what its text promises."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from pcg_compile.passes.scalar_writes import host_scalar_write

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

import notebooks  # noqa: E402

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def execute(path, monkeypatch, folder=EXAMPLES):
    """The notebook after a run; where it lies, it shows what is stored in the file."""
    for name, value in notebooks.environment().items():
        monkeypatch.setenv(name, value)
    # The kernel chooses the backend that draws into the notebook.
    monkeypatch.delenv("MPLBACKEND", raising=False)
    done = notebooks.execute(path, folder)
    if folder == EXAMPLES and not torch.cuda.is_available() and host_scalar_write() == "copies":
        stored = notebooks.texts(nbformat.read(path, as_version=4))
        assert stored == notebooks.texts(done), f"the outputs of {path.name} are old: make notebooks"
    return done


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def tables(notebook):
    return "".join(output.data["text/html"] for output in outputs(notebook) if "text/html" in output.get("data", {}))


def test_there_are_notebooks():
    numbers = [path.stem[:2] for path in NOTEBOOKS]
    assert numbers == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    # A reader sees every cell's output without running anything, and no error.
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert outputs(notebook) and not any(output.output_type == "error" for output in outputs(notebook))
    assert not re.search(r"/(root|home|work|tmp/\w+/)\S*site-packages", printed(notebook))
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (path.parent / link).exists(), f"{path.name} links to {link}, which is not there"


@pytest.mark.timeout(120)
def test_quickstart(monkeypatch):
    done = execute(EXAMPLES / "01_quickstart.ipynb", monkeypatch)
    text = printed(done)
    assert "fallbacks: ()" in text and "4 pieces, of which 3 are different, and 16 captured graphs" in text
    assert text.count("] = generate()") == 3 and "differs" not in text
    assert len(pictures(done)) == 1 and "quickstart::attention" in tables(done)


@pytest.mark.timeout(120)
def test_how_padding_works(monkeypatch):
    done = execute(EXAMPLES / "02_how_padding_works.ipynb", monkeypatch)
    text = printed(done)
    assert "12 rows and cu_seqlens = [0, 2, 5, 10, 12]" in text and "8 rows and cu_seqlens = [0, 3, 8]" in text
    assert "1.0000000150474662e+30" in text and "nan" in text and "mixing" in text
    assert len(pictures(done)) == 4


@pytest.mark.timeout(120)
def test_many_adapters(monkeypatch):
    pytest.importorskip("peft")
    done = execute(EXAMPLES / "03_many_adapters.ipynb", monkeypatch)
    text = printed(done)
    differences = [float(number) for number in re.findall(r"difference(?: from PEFT:)? ([\d.e+-]+)", text)]
    assert len(differences) == 5 and max(differences) < (1e-4 if not torch.cuda.is_available() else 1e-2)
    assert "fallbacks: ()" in text and "names the adapter 'klingon', which is not loaded" in text
    resident = [line for line in text.splitlines() if line.startswith("on the device:")]
    assert len(resident) == 2 and all("'sql'" in line for line in resident) and "'poetry'" in resident[1]
    assert len(pictures(done)) == 2


@pytest.mark.timeout(120)
def test_what_breaks_a_capture(monkeypatch):
    done = execute(EXAMPLES / "04_what_breaks_a_capture.ipynb", monkeypatch)
    text = printed(done)
    if host_scalar_write() == "copies":
        assert text.count("GraphBreakingScalarWrite: `seg_indptr[0] = 0`") == 2
        assert "rewritten to a fill on the device" in text
    assert re.search(r"element +scalar write", text) or host_scalar_write() != "copies"
    for fine in ("one_element_slice", "masked_number", "either_or"):
        assert re.search(rf"{fine} +fine", text)
    for found in ("masked_values      sync", "list_as_index      host copy", "tensor_of_numbers  host copy"):
        assert found in text
    assert "CaptureHazard: torch.tensor cannot be captured" in text and "between pieces" in tables(done)


@pytest.mark.timeout(120)
def test_looking_inside(monkeypatch):
    done = execute(EXAMPLES / "05_looking_inside.ipynb", monkeypatch)
    text = printed(done)
    assert "hazards: nothing found" in text and "replays: expected +5, counted +3" in text
    assert "running it: fine" in text and "pcg works on this machine" in re.sub(r"\x1b\[[\d;]*m", "", text)
    assert "index.html" in text and "pcg.prepare_batch" in text
    assert len(pictures(done)) == 1


@pytest.mark.timeout(120)
def test_speed_shows_what_is_stored(monkeypatch, tmp_path):
    """With the file of a run on a GPU beside it: wrong variants are not drawn."""
    rows = [
        {"n": n, "bucket": n, "variant": variant, "right": right, "ready_wall_ms": ms * (1 + n / 1000)}
        for variant, right, ms in (("eager", True, 9.0), ("pcg", True, 1.5), ("limit-exact", True, 1.4))
        for n in (1, 61, 1000)
    ]
    rows.append({"n": 61, "bucket": 64, "variant": "reduce-overhead", "right": False, "error": 1.4})
    run = {
        "command": "step", "argv": ["step", "--quick"], "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "a processor", "gpu": "a GPU"}, "versions": {"torch": "2.13"},
        "settings": {"shape": "1b"}, "rows": rows,
    }  # fmt: skip
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "step-1b.json").write_text(json.dumps(run))
    (folder / "step-tiny.json").write_text(json.dumps({**run, "machine": {"cpu": "a processor"}}))
    done = execute(EXAMPLES / "06_speed_on_a_gpu.ipynb", monkeypatch, tmp_path)
    text = printed(done)
    assert text.count("a GPU, a processor, 2026-01-02") == 1 and "python -m benchmarks step --quick" in text
    markdown = "".join(output.data.get("text/markdown", "") for output in outputs(done) if "data" in output)
    assert "| pcg | 1.50 | 1.59 | 3.00 |" in markdown and "numbers were wrong: reduce-overhead" in markdown
    assert len(pictures(done)) >= 1


@pytest.mark.timeout(120)
def test_speed_runs_where_it_lies(monkeypatch):
    done = execute(EXAMPLES / "06_speed_on_a_gpu.ipynb", monkeypatch)
    text = printed(done)
    assert "No results of a GPU are stored here" in text or "python -m benchmarks step" in text
