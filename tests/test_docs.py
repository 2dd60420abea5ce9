"""README and docs: every Python block runs, each page as one program; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from pcg_compile.passes.scalar_writes import host_scalar_write

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_BLOCK = re.compile(r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)?(?:#([\w-]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block's info words and code; blank lines ahead, so that a traceback names the page's own line."""
    text = page.read_text()
    return [(m["info"], "\n" * text.count("\n", 0, m.start("code")) + m["code"]) for m in _BLOCK.finditer(text)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, tmp_path, monkeypatch, capsys):
    """Blocks of a page share one namespace. ``no-run`` marks what needs a GPU or files of the reader's: it must parse.

    Where a block ends in comments such as ``# prints: 19``, its output must hold each of those texts.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    ran = 0
    for info, code in blocks(page):
        program = compile(code, str(page), "exec")
        if "no-run" in info:
            continue
        capsys.readouterr()
        exec(program, namespace)
        output = capsys.readouterr().out
        for wanted in re.findall(r"# prints: (.+)", code):
            if re.search(r"(ends|seg_indptr)\[0\] = 0", code) and host_scalar_write() == "fills":
                continue
            assert wanted in output, f"{page.name}: {wanted!r} is not in {output!r}"
        ran += 1
    torch._dynamo.reset()
    assert ran, f"{page.name} has no block that runs"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for path, anchor in _LINK.findall(page.read_text()):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {path}, which is not there"
        if anchor:
            headings = _HEADING.findall(target.read_text())
            anchors = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to #{anchor}, which {target.name} does not have"


def test_every_option_is_documented():
    from dataclasses import fields

    from pcg_compile.options import Options

    text = (ROOT / "docs" / "options.md").read_text()
    for field in fields(Options):
        assert f"`{field.name}`" in text, f"docs/options.md does not mention {field.name}"


def test_every_error_is_documented():
    from pcg_compile import errors

    text = (ROOT / "docs" / "errors.md").read_text()
    for name in errors.__all__:
        if isinstance(getattr(errors, name), type) and issubclass(getattr(errors, name), Exception):
            assert f"## {name}" in text, f"docs/errors.md has no section on {name}"


def test_every_public_name_is_documented():
    import pcg_compile as pcg

    text = "\n".join(page.read_text() for page in PAGES)
    for name in pcg.__all__:
        assert re.search(rf"\b{name}\b", text), f"no page mentions pcg.{name}"
