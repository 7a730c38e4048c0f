"""docs/weights.md: its code runs, what it links and names exists."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "weights.md").read_text()


def test_its_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, "weights.md", "exec"), names)
    assert (tmp_path / "packed" / "model.safetensors").exists()


def test_what_it_names_exists() -> None:
    root = DOCS.parent
    named = re.findall(r"\b(?:examples|tests)/[\w./-]+\.py\b", TEXT)
    links = re.findall(r"\]\(([^)#\s]+)#?([^)\s]*)\)", TEXT)
    assert named and links
    assert [name for name in named if not (root / name).exists()] == []
    for page, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(), flags=re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
