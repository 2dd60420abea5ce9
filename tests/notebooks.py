"""Runs notebooks, and compares their outputs; as a program, stores the outputs of all in examples/."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
#: Cells with this tag print what differs between machines and versions.
VARIES = "varies"
_MASKED = (
    (r"\x1b\[[\d;]*m", ""),
    (r"0x[0-9a-f]+", "#"),
    (r"(?<![\w.])/[\w./+-]+/", ""),
    (r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#"),
    (r"[\s─━]+", " "),
)


def execute(path: Path, folder: Path = EXAMPLES) -> Any:
    """The notebook after a run in a fresh kernel, whose outputs take the place of those that are stored."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


def environment() -> dict[str, str]:
    """What the kernel's process needs to import the checkout and draw into the notebook."""
    path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def texts(notebook: Any) -> list[str]:
    """What each code cell shows, numbers and paths masked; of a picture only that it is there."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or VARIES in cell.metadata.get("tags", ()):
            continue
        shown = ""
        for output in cell.outputs:
            if output.output_type == "stream":
                shown += output.text if output.name == "stdout" else ""
            else:
                data = output.get("data", {})
                shown += "[picture]" if "image/png" in data else data.get("text/markdown", data.get("text/plain", ""))
        for pattern, by in _MASKED:
            shown = re.sub(pattern, by, shown)
        found.append(shown.strip())
    return found


def main() -> None:
    os.environ |= environment()
    os.environ.pop("MPLBACKEND", None)
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        print(f"    {path.name}", flush=True)
        notebook = execute(path)
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number:02}"
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", ()):
                output.get("metadata", {}).clear()
            if "outputs" in cell:
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
