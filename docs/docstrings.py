"""The docstrings are plain text, and are made ready for the site here.

What Markdown would take for emphasis, a link or a tag is escaped, equations become blocks, and an argument that shares
its entry with others gets one of its own, so that its type and default are found.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):`~?([^`]+)`")
CODE = re.compile(r"(`+|~~~~)(?:.|\n)*?\1")
# Kept: stars that begin a line, of a list or of **keywords. "] [" would be a link with its target.
SPECIAL = re.compile(r"^ *\*+|\*|(?<=\])(?=\s?\[)|<(?=[A-Za-z/])|(?<!>)>(?!>)", flags=re.MULTILINE)
REPLACEMENTS = {"*": r"\*", "<": "&lt;", ">": "&gt;", "": "&#8203;"}
EQUATION = re.compile(r"^\.\. math::\n\n?((?: +.*\n)+)", flags=re.MULTILINE)
# What the equations use of TeX, as a reader would write it without.
TEX = {
    r"\\": "",
    "&": "",
    r"\,": "",
    r"\big": "",
    r"\qquad": "  ",
    r"\quad": " ",
    r"\tau": "τ",
    r"\beta": "β",
    r"\delta": "δ",
    r"\ge": ">=",
    r"\le": "<=",
    r"\lfloor ": "floor(",
    r" \rfloor": ")",
}
# The entry's own lines, and those that are indented further.
SHARED_ENTRY = re.compile(r"^( {4})(\w+(?:, \w+)+):(.*\n?(?:\1 +.*\n?)*)", flags=re.MULTILINE)


def escaped(text: str) -> str:
    """The text with what is special to Markdown escaped, outside of code; :func:`x` becomes `x`."""
    text = ROLE.sub(r"`\1`", text)
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [_escape(text[end : code.start()]), code.group()]
        end = code.end()
    return "".join([*parts, _escape(text[end:])])


def with_blocks(text: str) -> str:
    """Equations (``.. math::``) as blocks of plain text."""

    def block(match: re.Match[str]) -> str:
        equation = re.sub(r"\\(?:text|mathrm)\{([^}]*)\}", r"\1", textwrap.dedent(match[1]))
        for tex, plain in TEX.items():
            equation = re.sub(re.escape(tex) + (r"(?![a-z])" if tex[-1].isalpha() else ""), plain, equation)
        return "\n".join(["~~~~text", *(line.rstrip() for line in equation.rstrip().splitlines()), "~~~~", ""])

    return re.sub(r"::$", ":", EQUATION.sub(block, text), flags=re.MULTILINE)


def one_entry_each(text: str) -> str:
    """`a, b: what they are` in a section of arguments as an entry for a and one for b."""
    return SHARED_ENTRY.sub(
        lambda match: "".join(f"{match[1]}{name}:{match[3]}" for name in match[2].split(", ")), text
    )


def _escape(text: str) -> str:
    def replacement(match: re.Match[str]) -> str:
        begins_line = match.start() == 0 or text[match.start() - 1] == "\n"
        return match.group() if begins_line and "*" in match.group() else REPLACEMENTS[match.group()]

    return SPECIAL.sub(replacement, text)


class PlainDocstrings(griffe.Extension):
    """Escapes every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = escaped(with_blocks(one_entry_each(obj.docstring.value)))
