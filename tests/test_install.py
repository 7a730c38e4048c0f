"""What the package asks for, and that the documented commands leave an installed torch alone. No network."""

import configparser
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = {"cuda12x", "cuda13x", "hf", "equilibrium", "baselines", "eval", "rl", "snntorch", "docs", "test", "bench"}
REPLACES_TORCH = {"spikingjelly", "torchvision", "torchaudio"}


def requirement_lines(text: str) -> list[str]:
    """The requirements of a setup.cfg value or a constraints file."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def package_name(requirement: str) -> str:
    """The normalised name that a requirement begins with."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match.group()).lower()


@pytest.fixture(scope="module")
def metadata(repository: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(repository / "setup.cfg")
    return parser


def run_python(code: str, repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False)


def test_requirements_cannot_replace_torch(metadata: configparser.ConfigParser) -> None:
    base = {package_name(line) for line in requirement_lines(metadata["options"]["install_requires"])}
    extras = {
        extra: {package_name(line) for line in requirement_lines(text)}
        for extra, text in metadata["options.extras_require"].items()
    }
    assert "torch" in base
    assert set(extras) == EXTRAS
    assert not base & REPLACES_TORCH
    for extra, names in extras.items():
        assert names, f"extra {extra} is empty"
        assert not names & (REPLACES_TORCH | {"torch"}), f"extra {extra} may replace torch"
    assert not extras["cuda12x"] & extras["cuda13x"]


def test_constraints_pin_what_setup_allows(metadata: configparser.ConfigParser, repository: Path) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    lines = requirement_lines((repository / "constraints.txt").read_text())
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pins = {package_name(line): line.split("==")[1] for line in lines}
    needed = metadata["options"]["install_requires"]
    needed += "".join(metadata["options.extras_require"][extra] for extra in ("hf", "test", "docs", "bench"))
    for line in requirement_lines(needed):
        name = package_name(line)
        assert name in pins, f"{name} is not pinned"
        assert requirements.Requirement(line).specifier.contains(pins[name]), f"{line} excludes {pins[name]}"
    assert pins["spikingjelly"] == "2.0.0", "docs/install.md and the error message name 2.0.0"


@pytest.mark.parametrize("blocked", ["spikingjelly", "loguru"])
def test_missing_spikingjelly_is_one_line_with_the_command(blocked: str, repository: Path) -> None:
    code = f"""
import sys
sys.modules[{blocked!r}] = None
try:
    import spikelm.neurons
except ImportError as error:
    print(error)
"""
    result = run_python(code, repository)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    if blocked == "spikingjelly":
        assert "pip install --no-deps spikingjelly==2.0.0" in line
    else:
        assert blocked in line, "the message must not send the user to a package that is there"


def test_neurons_need_torch_and_spikingjelly_alone(repository: Path) -> None:
    code = """
import sys
for name in ("transformers", "datasets", "tokenizers", "accelerate", "matplotlib", "yaml", "cupy", "mamba_ssm"):
    sys.modules[name] = None
import torch
from spikelm.neurons import ATMN
print(ATMN(T=4).encode_sum(torch.tensor([2.5])).item())
"""
    result = run_python(code, repository)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "2.0\n"


@pytest.fixture(scope="module")
def source_copy(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip needs of the repository, elsewhere, so that a build leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, copy)
    shutil.copytree(repository / "spikelm", copy / "spikelm", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def pip_install(source: Path, installed_torch: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`pip install` of a copy of the source where torch has the given version, offline and without doing it."""
    for name in ("pip", "setuptools"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name} in this environment")
    site = source.parent / f"site-{installed_torch}"
    record = site / f"torch-{installed_torch}.dist-info"
    record.mkdir(parents=True, exist_ok=True)
    (record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {installed_torch}\n")
    (record / "INSTALLER").write_text("pip\n")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
    environment |= {"PYTHONPATH": str(site), "PIP_CONFIG_FILE": os.devnull}
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation"]
    command += ["--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("installed_torch", ["2.6.0+cu124", "2.11.0+cu130", "2.13.0"])
@pytest.mark.parametrize("extras", ["", "[hf]", "[snntorch,test]"])
def test_install_keeps_the_installed_torch(source_copy: Path, installed_torch: str, extras: str) -> None:
    result = pip_install(source_copy, installed_torch, f".{extras}")
    assert result.returncode == 0, result.stderr
    would = [line for line in result.stdout.splitlines() if line.startswith("Would install")]
    assert len(would) == 1
    assert re.fullmatch(r"Would install spikelm-\S+", would[0]), would[0]
    assert f"({installed_torch})" in result.stdout, "pip did not see the torch that was put there"


def test_pip_refuses_to_replace_a_torch_that_is_too_old(source_copy: Path) -> None:
    keep = source_copy.parent / "keep.txt"
    keep.write_text("torch==2.5.1+cu121\n")
    result = pip_install(source_copy, "2.5.1+cu121", "-c", str(keep), ".[hf]")
    assert result.returncode != 0
    assert "(constraint) torch==2.5.1" in result.stdout


def test_documented_commands_keep_torch(repository: Path) -> None:
    text = "\n".join((repository / name).read_text() for name in ("README.md", "docs/install.md"))
    commands = re.findall(r"^    (pip install .*)$", text, flags=re.MULTILINE)
    assert len(commands) >= 8
    for command in commands:
        if "spikingjelly" in command:
            assert "--no-deps spikingjelly==2.0.0" in command
        if "cuda1" in command:
            assert "-c keep.txt" in command
        extras = re.search(r"\.\[(.*?)\]", command)
        assert extras is None or set(extras.group(1).split(",")) <= EXTRAS
