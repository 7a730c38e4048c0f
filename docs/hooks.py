"""What MkDocs does not do itself: notebooks become pages, and sources that a page links to are shown in the site.

Both are Markdown before MkDocs sees them, so that it checks their links and anchors like everyone's.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# A link that leaves docs/: GitHub shows the file, the site a page under source/ with its text.
SOURCE_LINK = re.compile(r"(\]\()((?:\.\./)+)((?:spikelm|examples|benchmarks|tests)/[\w./-]+\.\w+)(\))")
LANGUAGES = {".py": "python", ".cuh": "cpp", ".cpp": "cpp", ".hpp": "cpp", ".yaml": "yaml"}


class NotebookFile(File):
    """A notebook that MkDocs takes for a page."""

    def is_documentation_page(self) -> bool:
        """Yes, whatever its suffix."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages of notebooks and linked sources."""
    root = Path(config.config_file_path).parent
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            files.append(NotebookFile(file.src_uri, config.docs_dir, config.site_dir, config.use_directory_urls))
    linked = {path for file in files.documentation_pages() for _, path in source_links(Path(str(file.abs_src_path)))}
    for path in sorted(linked):
        files.append(File.generated(config, f"source/{path}.md", content=source_page(root, path)))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:
    """The Markdown of a notebook, executed unless SPIKELM_EXECUTE_NOTEBOOKS says otherwise; None for another page."""
    if not page.file.src_uri.endswith(".ipynb"):
        return None
    return notebook_markdown(Path(str(page.file.abs_src_path)), execute=bool(config.extra["execute_notebooks"]))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Sends links to sources to their pages in the site."""
    up = "../" * page.file.src_uri.count("/")
    return SOURCE_LINK.sub(lambda match: f"{match[1]}{up}source/{match[3]}.md{match[4]}", markdown)


def source_links(page: Path) -> Iterator[tuple[str, str]]:
    """(the link, the path from the repository's root) of every source that a page links to."""
    for match in SOURCE_LINK.finditer(page.read_text(encoding="utf-8")):
        yield match[2] + match[3], match[3]


def source_page(root: Path, path: str) -> str:
    """A source file as a page, kept out of the search."""
    text = (root / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n# `{path}`\n\n~~~~{language}\n{text}~~~~\n"


def notebook_markdown(path: Path, execute: bool) -> str:
    """A notebook as Markdown: its text, its code, and what it prints and draws when executed in an empty directory."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    if execute:
        execute_notebook(notebook)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code":
            parts.append(fenced(cell.source, "python"))
            parts.extend(outputs_markdown(cell.outputs))
    return "\n\n".join(parts) + "\n"


def execute_notebook(notebook: Any, timeout: int = 600) -> None:
    """Runs every cell in a kernel of its own and an empty directory; an error of a cell is raised, no hub is asked.

    timeout: seconds for a cell.
    """
    from nbclient import NotebookClient

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as directory:
        resources = {"metadata": {"path": directory}}
        NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources).execute()


def fenced(text: str, language: str) -> str:
    """A block of code; tildes, so that the text may hold backticks."""
    return f"~~~~{language}\n{text.rstrip()}\n~~~~"


def outputs_markdown(outputs: list[Any]) -> Iterator[str]:
    """What a cell printed, drew or returned; progress (stderr, and what is displayed as HTML) is left out."""
    if printed := "".join(output.text for output in outputs if output.get("name") == "stdout"):
        yield fenced(printed, "output")
    for output in outputs:
        data = output.get("data", {})
        if "image/png" in data:
            yield f'<img alt="What the cell above draws" src="data:image/png;base64,{data["image/png"].strip()}">'
        elif "text/markdown" in data:
            yield data["text/markdown"]
        elif output.output_type == "execute_result":
            yield fenced(data["text/plain"], "output")
