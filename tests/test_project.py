"""What the project ships: the entry point, the linked folder of passes, and archives that hold both."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import pcg_compile as pcg
import pcg_compile.passes
from pcg_compile.options import Options, OptionsDict
from pcg_compile.torch_compat import probe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pcg_compile"
IN_A_CHECKOUT = pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the checkout")


def modules(folder: Path, name: str) -> set[str]:
    """Files that an archive must hold, as paths."""
    return {f"{name}/{path.relative_to(folder)}" for path in folder.rglob("*.py")}


EVERY_MODULE = modules(PACKAGE, "pcg_compile") | modules(ROOT / "passes", "pcg_compile/passes")


@IN_A_CHECKOUT
def test_passes_are_a_relative_link():
    link = PACKAGE / "passes"
    assert link.is_symlink() and os.readlink(link) == "../passes"
    assert Path(pcg_compile.passes.__file__).resolve() == ROOT / "passes" / "__init__.py"


def test_the_backend_is_an_entry_point():
    found = {entry.name: entry for entry in importlib.metadata.entry_points(group="torch_dynamo_backends")}
    if "pcg" in found:  # A checkout on the path has none, and registers the backend when it is imported.
        assert found["pcg"].load() is pcg.backend.pcg
    assert "pcg" in torch.compiler.list_backends()


def test_public_names_exist_and_are_documented():
    for name in pcg.__all__:
        assert getattr(pcg, name).__doc__, f"pcg.{name} has no docstring"
    assert list(pcg.__all__) == sorted(pcg.__all__)


@IN_A_CHECKOUT
def test_every_package_is_listed():
    listed = set(re.findall(r'^    "(pcg_compile[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.M))
    there = {"/".join(path.split("/")[:-1]).replace("/", ".") for path in EVERY_MODULE}
    assert listed == there


@IN_A_CHECKOUT
def test_archives_hold_every_module(tmp_path):
    """Builds as ``pip install`` does, from a copy, so nothing is left behind in the checkout."""
    pytest.importorskip("build")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("pcg_compile", "passes"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Without a choice, build makes the wheel from the sdist: what is in the wheel survived both.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert EVERY_MODULE | {"pcg_compile/py.typed"} <= names
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        assert "pcg = pcg_compile.backend:pcg" in archive.read(entry_points).decode()
        assert any(name.endswith("licenses/LICENSE") for name in names)
        assert not any(name.startswith(("tests/", "benchmarks/", "passes/")) for name in names)
        archive.extractall(tmp_path / "installed")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        assert inside >= EVERY_MODULE | {"LICENSE"}
    # What is in the wheel is enough: imported from elsewhere, with nothing of the checkout on the path.
    script = "import pcg_compile.passes as p; print(p.__file__); assert p.metadata_passes()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "installed" / "pcg_compile" / "passes" / "__init__.py")


#: Underscored, and yet what torch's own documentation tells extensions to use.
CUSTOMARY = ("torch._ops", "torch.utils._pytree", "torch.utils._python_dispatch.TorchDispatchMode")


def declared_names() -> set[str]:
    """Names of torch that the files of ``torch_compat`` declare, with the versions that they were read in."""
    for path in sorted((PACKAGE / "torch_compat").glob("*.py")):
        importlib.import_module(f"pcg_compile.torch_compat.{path.stem}")
    assert all(re.fullmatch(r"2\.\d+( to 2\.\d+)?", entry.versions) for entry in probe.declared())
    return {entry.name for entry in probe.declared()}


def private_parts(tree: ast.AST) -> list[str]:
    """Private modules of torch that are imported, and private attributes of ``torch`` that are read."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("torch._")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if "._" in name]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found += [f"torch.{node.attr}"] if re.match(r"_[^_]", node.attr) else []
    return [name for name in found if not name.startswith(CUSTOMARY)]


@IN_A_CHECKOUT
@pytest.mark.parametrize("path", sorted(EVERY_MODULE))
def test_private_parts_of_torch_are_named_in_torch_compat(path):
    found = private_parts(ast.parse((ROOT / path).read_text()))
    if not path.startswith("pcg_compile/torch_compat/"):
        assert found == []
        return
    # What is not looked up by its name there is declared beside; a module counts by what is declared in it.
    names = declared_names()
    assert [name for name in found if not any(one == name or one.startswith(name + ".") for one in names)] == []


MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (PACKAGE, ROOT / "passes")
    for path in sorted(folder.rglob("*.py"))
    if not path.is_relative_to(PACKAGE / "passes")
}


def imports_of(name: str) -> set[str]:
    """The modules of the project that a module imports, for type checking too."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            module = module.replace("pcg_compile.passes", "passes")
            names = (f"{module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else module for name in names}
    return (found & MODULES.keys()) - {name}


@IN_A_CHECKOUT
def test_imports_run_downwards():
    """No module imports one that imports it, for type checking or inside a function either."""
    imports = {name: imports_of(name) for name in MODULES}
    order = graphlib.TopologicalSorter(imports)
    order.prepare()  # Raises CycleError, which names the modules.
    assert len(MODULES) > 150


@IN_A_CHECKOUT
def test_files_are_small():
    assert [path for path in sorted(EVERY_MODULE) if len((ROOT / path).read_text().splitlines()) > 350] == []


@IN_A_CHECKOUT
def test_tests_share_helpers_and_do_not_sleep():
    """What several test files need is in a module that is none; nothing waits for the clock."""
    for path in sorted((ROOT / "tests").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            assert not any(name.startswith("test_") for name in names), (path.name, names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert f"{node.value.id}.{node.attr}" != "time.sleep", path.name


def test_this_torch_has_every_private_name():
    assert declared_names() and probe.missing() == []


def test_a_torch_without_a_private_name():
    """Importing goes on; using the name raises, and the doctor tells."""
    script = (
        "import torch, torch._dynamo.cache_size as c; del c.exceeds_recompile_limit; import pcg_compile\n"
        "from pcg_compile.report.doctor import CHECKS\n"
        "from pcg_compile.torch_compat import dynamo_traces\n"
        "(check,) = [c() for c in CHECKS if c.__name__ == '_private_names']\n"
        "assert check.status == 'fail' and 'torch._dynamo.cache_size.exceeds_recompile_limit' in check.found\n"
        "try:\n    dynamo_traces._exceeds_recompile_limit(1, 2)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "has no torch._dynamo.cache_size.exceeds_recompile_limit" in run.stdout
    assert "2.11" in run.stdout and "doctor" in run.stdout


@IN_A_CHECKOUT
@pytest.mark.parametrize("first", ["passes", "pcg_compile.passes", "passes.scalar_writes"])
def test_passes_by_either_name_are_one_module(first):
    """From a checkout the folder can be imported by its own name too, in either order."""
    script = (
        "import importlib, pkgutil, sys\n"
        f"importlib.import_module({first!r})\n"
        "import passes, pcg_compile.passes\n"
        "assert passes is pcg_compile.passes and sys.modules['passes'] is passes\n"
        "names = [m.name for m in pkgutil.walk_packages(passes.__path__, 'passes.')]\n"
        "assert 'passes.scalar_writes' in names and len(names) > 10\n"
        "for name in names:\n"
        "    assert importlib.import_module(name) is importlib.import_module('pcg_compile.' + name), name\n"
        "import passes.scalar_writes\n"
        "from passes.padding_safety.rules import register_row_rule\n"
        "assert passes.scalar_writes is pcg_compile.passes.scalar_writes\n"
        "assert register_row_rule is pcg_compile.register_row_rule\n"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@IN_A_CHECKOUT
@pytest.mark.parametrize(
    ("target", "installs"),
    [("demo", "-e '.[transformers]'"), ("docs", "DOCS_EXTRA")]
    + [(target, "-e '.[test,examples]'") for target in ("test", "notebooks", "lint", "bench", "nightly", "soak")],
)
def test_make_targets_expand(target, installs):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    run = subprocess.run(["make", "-n", target, "VENV=/nonexistent/venv"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "1 of 3: making" in run.stdout and "2 of 3: installing" in run.stdout and installs in run.stdout
    # pip's own progress is the progress of the longest phase.
    assert "pip" in run.stdout and " -q" not in run.stdout.partition("2 of 3")[2]


@IN_A_CHECKOUT
def test_options_are_typed(tmp_path):
    """A misspelt option, or a value of another type, is an error of a type checker."""
    pytest.importorskip("mypy")
    lines = {
        "pcg.piecewise(buckets=[4], strict=True)": True,
        "pcg.piecewise(dynamic={'x': 0}, guards='inputs', compiler=lambda gm, inputs: gm)": True,
        "options: OptionsDict = {'max_padding': None, 'compiler': 'eager'}": True,
        "pcg.load(None, 'model.pcg', cudagraph_mode='full')": True,
        "pcg.piecewise(bucket=[4])": False,
        "pcg.piecewise(max_tokens='8')": False,
        "pcg.piecewise(guards='input')": False,
        "pcg.load(None, 'model.pcg', stric=True)": False,
        "wrong: OptionsDict = {'capture': 'eager'}": False,
    }
    imports = ["import pcg_compile as pcg", "from pcg_compile.options import OptionsDict"]
    (tmp_path / "snippet.py").write_text("\n".join([*imports, *lines]) + "\n")
    files = [PACKAGE / f"{name}.py" for name in ("__init__", "piecewise", "saved_programs", "options")]
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path}"]
        + [tmp_path / "snippet.py", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = {int(number) for number in re.findall(r"snippet\.py:(\d+): error:", run.stdout)}
    assert found == {i for i, right in enumerate(lines.values(), len(imports) + 1) if not right}, run.stdout


def test_options_and_their_types_agree():
    assert list(OptionsDict.__annotations__) == [field.name for field in dataclasses.fields(Options)]
