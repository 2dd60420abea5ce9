"""Writes what pcg made of a model to a directory, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch

from ..errors import message
from ..fx.plan import PieceItem
from ..registry import runtimes
from ..torch_compat.inductor import inductor_output
from .items import items_of

__all__ = ["dump"]

#: Characters of a file that the page shows.
_LONGEST_SHOWN = 400_000


@contextmanager
def dump(directory: str | Path) -> Iterator[Path]:
    """Writes the graphs of all models that are compiled or called inside to ``directory``; gives its path.

    ``index.html`` shows all files: Dynamo's graph before and after the passes, the nodes that passes inserted and their
    notes, the list of pieces, each distinct piece as a script that runs, where Inductor wrote its code, and the program
    of every bucket. ``depyf`` adds its decompiled view of Dynamo's bytecode; if it fails, the page says so. Nothing is
    written outside the directory.

    Raises:
        ImportError: jinja2 or pygments is not installed.
    """
    highlight = _highlighter()
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    before = {id(runtime) for runtime in runtimes()}
    used = {id(runtime): runtime.shared.counters.all_steps for runtime in runtimes()}
    problems: list[str] = []
    with ExitStack() as stack:
        try:
            import depyf

            stack.enter_context(depyf.prepare_debug(str(root / "depyf")))
        except Exception as error:  # depyf reads private parts of torch and may fail in any way; the page says so
            problems.append(f"depyf could not start: {type(error).__name__}: {error}")
        yield root
        try:
            stack.close()
        except Exception as error:  # as above
            problems.append(f"depyf could not decompile: {type(error).__name__}: {error}")
    graphs = [r for r in runtimes() if id(r) not in before or r.shared.counters.all_steps != used[id(r)]]
    for index, runtime in enumerate(graphs):
        _write_graph(root / f"graph_{index}", runtime)
    _write_index(root, problems, highlight)


def _write_graph(folder: Path, runtime: Any) -> None:
    folder.mkdir(exist_ok=True)
    plan, context = runtime.plan, runtime.context
    if context.source is not None:
        _write_code(folder / "dynamo.py", "Dynamo's graph, as pcg got it.", context.source)
    _write_code(folder / "graph.py", "Dynamo's graph, after the passes.", plan.gm)
    _write_lines(folder / "inserted.txt", [node.format_node() for node in plan.gm.graph.nodes if _is_inserted(node)])
    _write_lines(folder / "notes.txt", context.notes)
    lines: list[str] = []
    outputs: list[str] = []
    scripts: dict[int, str] = {}
    for item, told in zip(plan.items, items_of(plan), strict=True):
        script = ""
        if isinstance(item, PieceItem) and told.distinct is not None:
            script = scripts.setdefault(told.distinct, f"{told.name.replace(' ', '_')}.py")
            if not (folder / script).exists():
                (folder / script).write_text(_piece_script(item), encoding="utf-8")
                path = inductor_output(item.compiled.function)
                if path is not None:
                    outputs.append(f"{script}  {path}")
        lines.append(f"{told.name:24}  {script:12}  {told.verdict} ({told.reason})  {told.module}  {told.where}")
    _write_lines(folder / "pieces.txt", lines)
    _write_lines(folder / "inductor.txt", outputs)
    for binding in runtime.bindings:
        for sizes, program in binding.steps.items():
            title = "_".join(map(str, sizes)) or "static"
            _write_lines(folder / f"program_{title}.txt", [str(program)])


def _write_lines(path: Path, lines: Iterable[str | None]) -> None:
    found = [line for line in lines if line is not None]
    if found:
        path.write_text("\n".join(found) + "\n", encoding="utf-8")


def _write_code(path: Path, title: str, gm: Any) -> None:
    path.write_text(f"# {title}\n" + gm.print_readable(print_output=False), encoding="utf-8")


def _is_inserted(node: Any) -> bool:
    """Whether a pass put a node there: what it reads from the step, and what pads and prepares metadata."""
    return "pcg_step_input" in node.meta or getattr(node.target, "namespace", "") == "pcg"


def _piece_script(item: PieceItem) -> str:
    """The piece as a module that can be run: its code, and inputs like those that it was compiled for."""
    gm = item.piece.gm
    code = gm.print_readable(print_output=False)
    for name in ("<lambda>", "GraphModule"):
        code = code.replace(f"class {name}", "class Piece")
    lines = [f"# {item.where}", *_needed_imports(gm), "", code, "", _WITH_PARTS, 'if __name__ == "__main__":']
    lines.append("    inputs = [")
    for value in item.piece.example:
        lines.append(f"        {_example(value)},")
    lines += ["    ]", "    print(with_parts(Piece).forward(*inputs))", ""]
    return "\n".join(lines)


#: What runs inside of an op, such as a checkpointed region, is printed as a class within the piece's.
_WITH_PARTS = '''
def with_parts(kind):
    """The module, and what its code names as its attributes."""
    module = kind()
    for name, part in list(vars(kind).items()):
        if isinstance(part, type):
            vars(module)[name] = torch.fx.symbolic_trace(with_parts(part))
    return module

'''
_IMPORTS = ("import operator", "import torch", "from torch import device, inf, nan", "import pcg_compile")
#: Of ops that are there once torch and pcg are.
_KNOWN = ("aten", "prims", "prim", "pcg", "inductor", "quantized", "c10d", "_c10d_functional", "higher_order")


def _needed_imports(gm: Any) -> list[str]:
    """The imports of a piece's script, and what has to be imported by hand: modules that define ops."""
    graphs = [part.graph for part in gm.modules() if isinstance(part, torch.fx.GraphModule)]
    functions = {name: value for graph in graphs for name, value in graph.python_code("self").globals.items()}
    named = [
        f"from {value.__module__} import {value.__name__} as {name}"
        for name, value in functions.items()
        if callable(value) and name.isidentifier() and not isinstance(value, type)
    ]
    targets = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    ops = {str(target) for target in targets if type(target).__name__ in ("OpOverload", "OpOverloadPacket")}
    by_hand = [f"# Import what defines {op} here." for op in sorted(ops) if op.partition(".")[0] not in _KNOWN]
    return ["", *_IMPORTS, *sorted(named), *by_hand]


def _example(value: Any) -> str:
    def number(size: Any) -> int:
        return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)

    if not isinstance(value, torch.Tensor):
        return repr(number(value))
    shape, strides = tuple(map(number, value.shape)), tuple(map(number, value.stride()))
    # Rows of an expanded tensor share memory, and can be seen so, but not be filled so.
    needed = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    random = value.is_floating_point() or value.is_complex()
    make = f"torch.{'randn' if random else 'zeros'}({needed}, device={str(value.device)!r}).to({value.dtype})"
    return f"{make}.as_strided({shape}, {strides})"


def _highlighter() -> Any:
    """Imports what the page is made with; returns ``fn(name, text)``, which makes HTML of a file, and its styles."""
    try:
        import jinja2
        from pygments import highlight
        from pygments.formatters import HtmlFormatter
        from pygments.lexers import PythonLexer, TextLexer
    except ImportError as error:
        what = f"pcg.dump() needs {error.name}, which is not installed"
        raise ImportError(message(what, cure="Write: pip install jinja2 pygments")) from error

    formatter = HtmlFormatter()
    template = jinja2.Template(Path(__file__).with_name("dump.html").read_text(encoding="utf-8"), autoescape=True)

    def code(name: str, text: str) -> str:
        # The graph of a large model has many thousand lines: it is linked, and opened by hand.
        if len(text) > _LONGEST_SHOWN:
            return "<p>Too long to be shown here.</p>"
        shown: str = highlight(text, PythonLexer() if name.endswith(".py") else TextLexer(), formatter)
        return shown

    return code, lambda **values: template.render(style=formatter.get_style_defs(".highlight"), **values)


def _write_index(root: Path, problems: list[str], highlighter: Any) -> None:
    """One page that shows every file, and links to each; pcg's own come before depyf's."""
    code, render = highlighter
    names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() and p.suffix != ".lock"]
    names = sorted((n for n in names if n != "index.html"), key=lambda name: (name.startswith("depyf/"), name))
    files = []
    for number, name in enumerate(names):
        text = (root / name).read_text(encoding="utf-8", errors="replace")
        group, _, short = name.rpartition("/")
        shown = {"name": name, "group": group, "short": short, "id": f"file-{number}", "link": quote(name)}
        files.append({**shown, "lines": text.count("\n"), "code": code(name, text), "open": short == "pieces.txt"})
    (root / "index.html").write_text(render(files=files, problems=problems), encoding="utf-8")
