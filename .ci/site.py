"""Hooks of mkdocs: the README is the site's first page, and links to files outside docs/ lead to pages of the site.

Links are written for a reader of the repository, ``../examples/encoder.py`` or ``docs/lora.md``. On the site the project's
texts, examples and notebooks lie beside the guides.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
#: Of the repository, to their place in the site.
PAGES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
FILES = (
    "LICENSE",
    "CITATION.cff",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "examples").glob("[!.]*.*"))),
)
_LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    for source, place in (PAGES | {name: name for name in FILES}).items():
        # Written for a reader in the repository's root, where the guides are in docs/.
        if place.endswith(".md"):
            text = (ROOT / source).read_text(encoding="utf-8")
            files.append(File.generated(config, place, content=text))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    in_root = page.file.src_uri in PAGES.values()

    def moved(match: re.Match[str]) -> str:
        target = match[1]
        if in_root:
            target = PAGES.get(target, target.removeprefix("docs/"))
        elif target.startswith("../"):
            target = PAGES.get(target[3:], target[3:])
        return f"]({target}"

    return _LINK.sub(moved, markdown)
