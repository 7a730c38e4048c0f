"""The directory of built kernels: whose it is, who can write to it, and what happens to a kernel that was changed."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spikelm import errors
from spikelm.cpu import module, store
from spikelm.errors import SpikelmError, SpikelmWarning
from spikelm.ops import break_even

NAMES = ("forward",)
KEY = "0" * 32


def source(answer: int) -> str:
    """A source that compiles at once."""
    return f'extern "C" int forward(const void*) {{ return {answer}; }}\n'


def call(text: str) -> int:
    """The answer of a source's library."""
    return module._load(module.build(text), NAMES)["forward"](b"")


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of an empty cache that does not exist yet."""
    monkeypatch.setenv("SPIKELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(errors, "_SAID", set())
    return tmp_path / "cache"


@pytest.fixture
def compiler() -> None:
    if reason := module.unavailable():
        pytest.skip(reason)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.usefixtures("compiler")
def test_what_is_built_is_the_users_alone(root: Path) -> None:
    before = os.umask(0)
    try:
        library = module.build(source(1))
    finally:
        os.umask(before)
    assert (mode(root), mode(root / "cpu")) == (0o700, 0o700)
    digest = library.with_name(f"{library.name}.sha256")
    assert digest.read_text() == f"{hashlib.sha256(library.read_bytes()).hexdigest()}  {library.name}\n"
    assert {path.suffix for path in (root / "cpu").iterdir()} == {".so", ".sha256", ".lock"}


def test_a_directory_that_others_could_read_is_closed(root: Path) -> None:
    (root / "cpu").mkdir(parents=True)
    (root / "cpu").chmod(0o755)
    assert mode(store.private_directory("cpu")) == 0o700


@pytest.mark.parametrize("where", [".", "cpu"])
def test_a_link_is_refused(where: str, root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "cpu").mkdir(parents=True)
    if where == ".":
        root.symlink_to(elsewhere)
    else:
        root.mkdir()
        (root / where).symlink_to(elsewhere)
    with pytest.raises(SpikelmError, match="is a link: set SPIKELM_CACHE to a directory of your own"):
        store.private_directory("cpu")


@pytest.mark.parametrize("where", [".", "cpu"])
@pytest.mark.parametrize("bits", [0o770, 0o707])
def test_a_directory_that_others_can_write_to_is_refused(where: str, bits: int, root: Path) -> None:
    (root / "cpu").mkdir(parents=True)
    (root / where).chmod(bits)
    with pytest.raises(SpikelmError, match="others can write to .*SPIKELM_CACHE"):
        store.private_directory("cpu")


def test_a_directory_as_tmp_is(root: Path) -> None:
    """Everybody may write there, and nobody may move what is another's."""
    root.mkdir()
    root.chmod(0o1777)
    assert store.private_directory("cpu") == root / "cpu"


@pytest.mark.parametrize("where", [".", "cpu"])
def test_another_users_directory_is_refused(where: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "cpu").mkdir(mode=0o700, parents=True)
    lstat, other = Path.lstat, os.geteuid() + 1

    def owned(path: Path) -> os.stat_result:
        found = lstat(path)
        return os.stat_result([*found[:4], other, *found[5:]]) if path == (root / where) else found

    monkeypatch.setattr(Path, "lstat", owned)
    with pytest.raises(SpikelmError, match=f"belongs to user {other}, not to {os.geteuid()}"):
        store.private_directory("cpu")


@pytest.mark.usefixtures("compiler")
def test_the_reference_takes_over_where_the_cache_is_refused(root: Path, repository: Path) -> None:
    """In a new process, with one warning and the same spikes."""
    root.mkdir()
    root.chmod(0o777)
    code = (
        "import warnings, torch\n"
        "from spikelm.neurons import ATMN\n"
        "x = torch.linspace(-3, 3, 99)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    same = torch.equal(ATMN()(x), ATMN(backend='torch')(x)) and torch.equal(ATMN()(x), ATMN()(x))\n"
        "print(same, [str(one.message) for one in said if 'reference is used' in str(one.message)])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True [\"backend 'cpu': others can write to"), done.stdout + done.stderr
    assert done.stdout.count("others can write") == 1
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("key", ["../../etc/x", "", "0" * 31, "0" * 33, "G" * 32, f"{'0' * 31}/", f"{'0' * 32}\n"])
def test_a_key_names_no_other_place(key: str) -> None:
    with pytest.raises(SpikelmError, match="32 hexadecimal digits"):
        store.kernel_path("cpu", key, ".so")


# ---- what is there was built there


def kept(root: Path) -> Path:
    path = store.kernel_path("cuda", KEY, ".cubin")
    store.private_directory("cuda")
    store.keep_kernel(path, b"a kernel")
    return path


def test_a_kernel_comes_back(root: Path) -> None:
    path = kept(root)
    assert store.read_kernel(path) == b"a kernel"
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]


@pytest.mark.parametrize(
    "change", ["cut", "bit", "other kernel", "no digest", "digest", "digest of another name", "digest no text"]
)
def test_a_changed_kernel_is_not_used(change: str, root: Path) -> None:
    path = kept(root)
    digest = path.with_name(f"{path.name}.sha256")
    if change == "cut":
        path.write_bytes(b"a ker")
    elif change == "bit":
        path.write_bytes(b"a kernem")
    elif change == "other kernel":
        path.write_bytes(b"another's kernel")
    elif change == "no digest":
        digest.unlink()
    elif change == "digest":
        digest.write_text("0" + digest.read_text()[1:])
    elif change == "digest no text":
        digest.write_bytes(b"\xff\xfe\x00")
    else:
        digest.write_text(digest.read_text().replace(path.name, "other.cubin"))
    assert store.read_kernel(path) is None
    if change == "no digest":
        store.warn_of_damage(path)  # nothing: an older version's
    else:
        with pytest.warns(SpikelmWarning, match=f"{path} is not what was built there, by its SHA-256"):
            store.warn_of_damage(path)


@pytest.mark.usefixtures("compiler")
def test_a_changed_library_is_built_anew_and_never_loaded() -> None:
    library, planted = module.build(source(1)), module.build(source(666))
    library.write_bytes(planted.read_bytes())
    with pytest.warns(SpikelmWarning, match="is built anew"):
        assert call(source(1)) == 1
    assert call(source(1)) == 1  # without a second warning


@pytest.mark.usefixtures("compiler")
def test_a_library_of_an_older_version_is_built_anew() -> None:
    library = module.build(source(1))
    library.write_bytes(module.build(source(666)).read_bytes())
    library.with_name(f"{library.name}.sha256").unlink()
    assert call(source(1)) == 1


def test_a_measurement_that_is_a_pipe_or_huge_is_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a pipe would wait for ever."""
    monkeypatch.setattr(break_even, "_measure", lambda weights, tokens: 0.5)
    root.mkdir()
    path = root / "break_even.json"
    os.mkfifo(path)
    break_even._known.cache_clear()
    assert break_even.break_even(torch.float32, 1) == 0.5
    assert path.is_file()
    path.write_bytes(b"[" * (break_even._MOST_BYTES + 1))
    assert break_even._kept(path) == {}
    path.write_bytes(b"[" * 100_000)  # deeper than Python's parser goes
    assert break_even._kept(path) == {}
    break_even._known.cache_clear()
