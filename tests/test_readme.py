# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
EXAMPLES = [
    pytest.param(page, example, id=f"{page.stem}-{i}")
    for page in PAGES
    for i, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("page", "example"), EXAMPLES)
def test_example(page: Path, example: str) -> None:
    if "transformers" in example:
        pytest.importorskip("transformers")
    exec(compile(example, str(page), "exec"), {})


def test_there_are_examples() -> None:
    pages = [example.values[0] for example in EXAMPLES]
    assert pages.count(ROOT / "README.md") >= 2
    assert pages.count(ROOT / "docs/guide.md") >= 8


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_each_operator_has_its_equivalent() -> None:
    guide = (ROOT / "docs/guide.md").read_text()
    for op in (
        "causal_conv1d",
        "selective_scan",
        "causal_conv1d_update",
        "selective_state_update",
    ):
        (section,) = re.findall(rf"^### {op}\n(.*?)(?=^##|\Z)", guide, re.DOTALL | re.MULTILINE)
        assert "# Equivalent to:" in section
        assert f"{op}(" in section
