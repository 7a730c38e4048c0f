"""The pages that the tests of the documentation read: README and docs/, and what is in them."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
# From the repository's root, as the tests name them.
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))]
NOTEBOOKS = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.ipynb"))

FENCE = re.compile(r"^(```+|~~~+) *(\S*).*?\n(.*?)^\1 *$", flags=re.MULTILINE | re.DOTALL)
# A whole line of a block, or what stands in backticks, where `spikelm ...` may be something else.
COMMAND = re.compile(
    r"^ {4}(?:\$ )?((?:python|make|pip|spikelm) .*)|`((?:python|make|pip) [^`\n]*)", flags=re.MULTILINE
)


def text_of(page: str) -> str:
    """A page's Markdown."""
    return (ROOT / page).read_text(encoding="utf-8")


def python_blocks(page: str) -> list[str]:
    """The blocks of a page that are marked as Python, in order."""
    return [match[3] for match in FENCE.finditer(text_of(page)) if match[2] == "python"]


def python_fences(page: str) -> int:
    """How many fences of a page open a block of Python, however they are written or indented."""
    return len(
        re.findall(r"^[ >*-]*(?:```+|~~~+) *\{?\.?(?:py|ipython)", text_of(page), flags=re.MULTILINE | re.IGNORECASE)
    )


def without_fences(page: str) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", text_of(page))


def commands(page: str) -> Iterator[str]:
    """Shell commands of a page, whole lines of indented or fenced blocks and what stands in backticks."""
    blocks = [match[3] for match in FENCE.finditer(text_of(page)) if match[2] in ("bash", "sh", "shell", "console")]
    text = textwrap.indent("\n".join(blocks), " " * 4) + "\n" + without_fences(page)
    for match in COMMAND.finditer(joined_lines(text)):
        yield re.split(r"\s{2,}#", match[1] or match[2])[0].strip()


def joined_lines(text: str) -> str:
    """Lines that end in a backslash, or in the middle of a name in backticks, as one."""
    text = re.sub(r" *\\\n *", " ", text)
    return re.sub(r"`([^`\n]+)\n([^`\n]+)`", r"`\1 \2`", text)


def links(page: str) -> list[tuple[str, str]]:
    """(target, anchor) of every link and picture of a page; a target is "" within the page."""
    text = re.sub(r"`[^`\n]*`", "", without_fences(page))
    return re.findall(r"\]\(\s*<?([^)#\s>]*)#?([^)\s>]*)>?\s*\)", text)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
