# SPDX-License-Identifier: Apache-2.0
"""The documentation site: pages and pictures from outside of docs/, and the links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
PICTURES = {
    str(path.relative_to(ROOT)): f"figures/{path.name}"
    for path in ROOT.glob("benchmarks/results/*.png")
}
SITE = PAGES | PICTURES


def on_files(files: Any, config: Any) -> Any:
    for source, target in SITE.items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns the repository's links into the site's; one to a source file becomes its name."""
    source = {target: source for source, target in PAGES.items()}.get(
        page.file.src_uri, f"docs/{page.file.src_uri}"
    )

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path not in SITE and not path.startswith("docs/"):
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{source}: a link's target must exist; got {target}")
            return f"`{text}`" if text[0] != "`" else text
        there = SITE.get(path, path.removeprefix("docs/"))
        relative = posixpath.relpath(there, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, markdown)
