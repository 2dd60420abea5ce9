"""README and docs: every Python block runs, each page as one program; links lead somewhere."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from benchmarks import chart
from pcg_compile.passes.scalar_writes import host_scalar_write

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "DESIGN.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
_BLOCK = re.compile(r"^```python[ \t]*(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)?(?:#([\w-]+))?\)")
_HEADING = re.compile(r"^#+ (.+)$", re.M)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Each block's info words and code; blank lines ahead, so a traceback names the page's own line."""
    text = page.read_text()
    return [(m["info"], "\n" * text.count("\n", 0, m.start("code")) + m["code"]) for m in _BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder in which the README's model name leads to a tiny checkpoint of the same kind."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("checkpoints")
    words = {word: i for i, word in enumerate(["[UNK]", "Once", "upon", "a", "time", "CUDA", "graphs", "are"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder / "Qwen" / "Qwen3-0.6B")
    config = transformers.Qwen3Config(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "Qwen" / "Qwen3-0.6B")
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", [page for page in PAGES if _BLOCK.search(page.read_text())], ids=lambda p: p.stem)
def test_blocks_run(page, tmp_path, monkeypatch, capsys, request):
    """Blocks of a page share one namespace. ``no-run`` marks what needs a GPU or files of the reader's: it must parse.

    Where a block ends in comments such as ``# prints: 19``, its output must hold each of those texts.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.chdir(request.getfixturevalue("checkpoints") if page.stem == "README" else tmp_path)
    # A module that can be imported: Dynamo looks up globals of functions that it inlines by their module's name.
    module = types.ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    ran = 0
    for info, code in blocks(page):
        program = compile(code, str(page), "exec")
        if "no-run" in info:
            continue
        capsys.readouterr()
        exec(program, module.__dict__)
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


def test_the_chart_is_drawn_from_its_results():
    """What is committed is what ``python -m benchmarks chart`` draws; every bar says its figure."""
    data = json.loads(chart.SOURCE.read_text())
    assert chart.TARGET.read_text() == chart.chart(data)
    assert len(chart.bars(data)) >= 3
    for _, label, value in chart.bars(data):
        assert label in chart.chart(data) and f"{value:.2f} ms" in chart.chart(data)


def test_the_readme_has_few_figures():
    table = (ROOT / "README.md").read_text().partition("<!-- figures:begin")[2].partition("<!-- figures:end")[0]
    assert 3 <= len(re.findall(r"^\| (?!workload).+\|$", table, re.M)) <= 8


def test_every_page_is_in_the_site():
    named = set(re.findall(r": ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= named


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
