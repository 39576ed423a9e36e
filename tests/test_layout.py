# SPDX-License-Identifier: Apache-2.0
"""The path of a file in csrc/ tells who compiles it and what it may include."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
FILES = sorted(path for path in CSRC.rglob("*") if path.is_file())
INCLUDE = re.compile(r'^\s*#include ([<"])([^>"]+)[>"]', re.MULTILINE)


def included(path: Path) -> list[tuple[str, str]]:
    return INCLUDE.findall(path.read_text())


def device(path: Path) -> str | None:
    """cpu or cuda, of a kernel's file."""
    folder = path.parent.name
    return folder if folder in ("cpu", "cuda") else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CSRC)))
def test_includes(path: Path) -> None:
    for bracket, name in included(path):
        if bracket == '"':
            # From csrc, with a folder: nothing of ours can be taken for a header such as <math.h>.
            assert "/" in name
            assert (CSRC / name).is_file(), name
        if device(path):
            assert not name.startswith(("torch/", "ATen/", "c10/", "common/host/")), name
            assert not name.endswith("/backend.h"), name
            other = {"cpu": "/cuda/", "cuda": "/cpu/"}[device(path) or ""]
            assert other not in name, name


def test_kernels_are_compiled_by_what_their_folder_says() -> None:
    for path in FILES:
        if path.suffix in (".cu", ".cuh"):
            assert device(path) == "cuda", path
        assert device(path) != "cuda" or path.suffix != ".cpp", path


def test_nothing_is_cast_to_be_written() -> None:
    assert [path for path in FILES if "const_cast" in path.read_text()] == []
