"""The site builds strictly, is whole, fetches nothing from elsewhere, and fits a narrow screen."""

import functools
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.documents import NOTEBOOKS, PAGES, ROOT

for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="needs the extra docs")

PROBE = """<!doctype html><meta charset="utf-8"><iframe width="390" height="844" style="border: 0"></iframe><pre></pre>
<script>
const pages = PAGES, frame = document.querySelector("iframe"), found = document.querySelector("pre");
frame.onload = () => setTimeout(() => {
    const root = frame.contentDocument.documentElement;
    const wide = [...frame.contentDocument.querySelectorAll("article > *")]
        .filter(part => part.getBoundingClientRect().right > 391).map(part => part.tagName);
    found.textContent += `${frame.dataset.page} ${root.scrollWidth} ${root.clientWidth} ${wide.join(",")}\\n`;
    next();
}, 50);
function next() {
    const page = pages.shift();
    if (page) { frame.dataset.page = page; frame.src = page; } else { found.textContent += "end"; }
}
next();
</script>"""


class References(HTMLParser):
    """The ids of a page, what it links to, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.linked: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.linked.append(given["href"])
        if tag == "link" and given.get("rel") not in ("next", "prev", "canonical"):
            self.loaded.append(given["href"])
        self.loaded += [given["src"]] if "src" in given else []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly; its notebooks are executed by tests of their own."""
    directory = tmp_path_factory.mktemp("site")
    environment = os.environ | {"SPIKELM_EXECUTE_NOTEBOOKS": "false", "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


@pytest.fixture(scope="module")
def references(site: Path) -> dict[Path, References]:
    """Of every HTML file of the site."""
    found = {}
    for path in site.rglob("*.html"):
        found[path] = References()
        found[path].feed(path.read_text(encoding="utf-8"))
    return found


def test_every_page_is_in_the_site(site: Path) -> None:
    sources = [page for page in [*PAGES, *NOTEBOOKS] if page.startswith("docs/")]
    missing = [page for page in sources if not (site / page.removeprefix("docs/")).with_suffix(".html").exists()]
    assert missing == []
    assert not list(site.rglob("*.py"))


def test_links_and_anchors_of_the_site(site: Path, references: dict[Path, References]) -> None:
    checked, wrong = 0, []
    for path, page in references.items():
        if path.name == "404.html":  # its addresses are those of a server
            continue
        for address in page.linked + page.loaded:
            parts = urlsplit(address)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            known = references[target].ids if target in references else set()
            whole = target.exists() and (not parts.fragment or unquote(parts.fragment) in known)
            wrong += [] if whole else [f"{path.relative_to(site)}: {address}"]
            checked += 1
    assert checked > 2000
    assert wrong == []


def test_nothing_is_fetched_from_elsewhere(site: Path, references: dict[Path, References]) -> None:
    loaded = {address for page in references.values() for address in page.loaded}
    assert {address for address in loaded if urlsplit(address).scheme not in ("", "data")} == set()
    for style in site.rglob("*.css"):
        addresses = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", style.read_text(encoding="utf-8"))
        assert not [one for pair in addresses for one in pair if urlsplit(one).scheme not in ("", "data")], style


def test_sources_that_pages_link_to_are_shown(site: Path) -> None:
    page = (site / "source/spikelm/ops/reference.py.html").read_text(encoding="utf-8")
    assert "multi" in page
    assert 'href="source/spikelm/ops/reference.py.html"' in (site / "kernels.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["neurons", "layers", "models", "distill", "data", "energy"])
def test_the_api_has_every_public_name(package: str, site: Path, references: dict[Path, References]) -> None:
    module = importlib.import_module(f"spikelm.{package}")
    shown = {
        name.rpartition(".")[2] for path, page in references.items() if path.parent.name == "api" for name in page.ids
    }
    assert [name for name in module.__all__ if name not in shown] == []
    assert {"spikify", "calibrate", "deploy", "use_backend", "Recipe", "evaluate", "train"} <= shown


class Quiet(SimpleHTTPRequestHandler):
    """A server that says nothing."""

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing."""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served for the time of a test."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_no_page_is_wider_than_a_telephone(site: Path, address: str, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs chromium, which is not installed")
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if "source" not in path.parts)
    (site / "probe.html").write_text(PROBE.replace("PAGES", str(pages)), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command += ["--virtual-time-budget=60000", f"{address}/probe.html"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    try:
        shown, _ = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    measured = re.findall(r"^(?:.*<pre>)?(\S+\.html) (\d+) (\d+) ?(.*)$", shown, flags=re.MULTILINE)
    assert [page for page, *_ in measured] == pages
    assert {page: parts for page, width, screen, parts in measured if int(width) > int(screen) or parts} == {}
