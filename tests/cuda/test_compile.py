"""The CUDA kernels as a GPU's compiler sees them: nvcc or NVRTC builds them here, without a GPU."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spikelm.cpu import attention, spike_linear
from spikelm.cpu.module import storage
from spikelm.cuda import launch, module
from spikelm.ops.kernel import Kernel
from tests.cuda.cases import DTYPES, NIGHTLY, STEPS, covering, neurons
from tests.cuda.shim import SOURCES
from tests.kernel_cases import Case, dynamics, kernel_for

ARCHITECTURES = ("sm_80", "sm_90")
NAMES = ("FORWARD", "FORWARD_SUM", "BACKWARD", "BACKWARD_SUM")
HEAVIEST = Case(
    dynamics("ternary", "soft_delayed", "ATAN")
)  # most registers: two thresholds, a division for each slope
Compile = Callable[..., str]


def _nvrtc() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception:
        return False
    return True


def _by_nvrtc(definitions: str, architecture: str, cubin: Path, source: str = "multistep.cuh") -> str:
    built, log = module.compile_cubin(definitions, architecture, ("--ptxas-options=-v",), source)
    cubin.write_bytes(built)
    return log


def _by_nvcc(definitions: str, architecture: str, cubin: Path, source: str = "multistep.cuh") -> str:
    options = ("-cubin", f"-arch={architecture}", "-Xptxas", "-v", "-o", str(cubin))
    return _nvcc(definitions, cubin, source, *options).stderr


def _ptx(definitions: str, folder: Path, source: str = "multistep.cuh") -> str:
    return _nvcc(definitions, folder / "kernel.cubin", source, "-ptx", "-arch=sm_90", "-o", "-").stdout


def _nvcc(definitions: str, cubin: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = cubin.with_suffix(".cu")
    path.write_text(f'{definitions}#include "{source}"\n')
    command = ["nvcc", *module.OPTIONS, *options, "-I", str(SOURCES), str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="session")
def compile_for() -> Compile:
    """compile_for(definitions, architecture, cubin, source) writes a cubin and returns what ptxas says."""
    if _nvrtc():
        return _by_nvrtc
    if shutil.which("nvcc"):
        return _by_nvcc
    pytest.skip("needs NVRTC (CuPy) or nvcc, and there is neither")


def spilled(log: str, source: str = "multistep.cuh") -> list[tuple[str, int, int]]:
    """(kernel, bytes of stack, bytes stored) of every kernel in a log that has any."""
    kernels = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    found = []
    for name, report in zip(kernels[::2], kernels[1::2], strict=True):
        numbers = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", report)
        assert numbers, report
        found.append((name, int(numbers[1]), int(numbers[2])))
    assert {name for name, *_ in found} == set(module.KERNELS[source])
    return [kernel for kernel in found if any(kernel[1:])]


def specialisations() -> list[tuple[str, str, int]]:
    """(architecture, definitions, T): every neuron, type and number of steps; by default some of one neuron."""
    if NIGHTLY:
        kernels = list(dict.fromkeys(kernel_for(case) for case in neurons()))
        rows = covering(kernels, NAMES, DTYPES, STEPS, (True, False), ARCHITECTURES)
    else:
        kernels = [kernel_for(HEAVIEST)]
        rows = covering(kernels, NAMES, (torch.float32, torch.bfloat16), (4, 16, 33), (True,), ARCHITECTURES)
    return [(architecture, definitions(*row), row[3]) for *row, architecture in rows]


def definitions(kernel: Kernel, name: str, dtype: torch.dtype, T: int, in_vectors: bool) -> str:
    """What launch.py has built where the layout allows vectors, or not."""
    vector = launch.most_neurons(name, dtype, T) if in_vectors else 1
    unrolled, backward = T if T <= 32 else 0, name.startswith("BACKWARD")
    return launch.definitions(kernel.definitions, dtype, dtype, name, unrolled, vector, backward)


@pytest.mark.parametrize(("architecture", "text", "T"), specialisations())
def test_compiles_without_spilling(architecture: str, text: str, T: int, compile_for: Compile, tmp_path: Path) -> None:
    log = compile_for(text, architecture, tmp_path / "kernel.cubin")
    assert T > 16 or spilled(log) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("T", "channels"), [(4, 64), (16, 128)])
def test_attention_compiles_without_spilling(
    T: int, channels: int, architecture: str, compile_for: Compile, tmp_path: Path
) -> None:
    kernel = kernel_for(Case(dynamics("binary", "soft_delayed"))).definitions
    text = attention.definitions(kernel, T, channels) + storage(torch.float32, torch.bfloat16)
    log = compile_for(text, architecture, tmp_path / "kernel.cubin", "attention.cuh")
    assert spilled(log, "attention.cuh") == []


WEIGHTS = {  # (form, stored as, what a thread loads at once, tokens)
    "float32": ("float", torch.float32, 16, 4),
    "bfloat16": ("float", torch.bfloat16, 16, 1),
    "int8": ("int8", torch.int8, 16, 4),  # most sums
    "binary": ("binary", torch.uint8, 4, 2),
    "ternary": ("ternary", torch.uint8, 4, 4),
}


def projection(form: str, stored: torch.dtype, loaded: int, tokens: int) -> str:
    """What cuda/spike_linear.py has built behind neurons in bfloat16."""
    kernel = kernel_for(Case(dynamics("ternary", "soft", first=True))).definitions
    text = spike_linear.definitions(kernel, True, stored, form) + storage(torch.bfloat16, torch.bfloat16)
    return f"{text}#define TOKENS {tokens}\n#define BYTES {loaded}\n"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_projections_compile_without_spilling(
    weights: tuple[str, torch.dtype, int, int], architecture: str, compile_for: Compile, tmp_path: Path
) -> None:
    """With registers to spare for two blocks of 256 threads on a multiprocessor, which has 64 k of them."""
    log = compile_for(projection(*weights), architecture, tmp_path / "kernel.cubin", "spike_linear.cuh")
    assert spilled(log, "spike_linear.cuh") == []
    registers = [int(used) for used in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == len(module.KERNELS["spike_linear.cuh"])
    assert max(registers) <= 128, registers


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_rows_are_loaded_ahead_and_in_128_bits(weights: str, tmp_path: Path) -> None:
    code = _ptx(projection(*WEIGHTS[weights]), tmp_path, "spike_linear.cuh")
    before_a_sum = code.split(".entry gather")[1].split("fma.rn.f32")[0]
    assert len(re.findall(r"ld\.global\.(v4\.\w32|v2\.\w64)", before_a_sum)) >= 4


def test_a_spill_is_found(compile_for: Compile, tmp_path: Path) -> None:
    """With all the registers that the compiler may use it does not spill; twice the neurons are too many."""
    text = definitions(kernel_for(HEAVIEST), "BACKWARD", torch.float32, 16, True).replace("VECTOR 2", "VECTOR 8")
    assert "run" in {kernel for kernel, *_ in spilled(compile_for(text, "sm_90", tmp_path / "kernel.cubin"))}


def _disassembler() -> list[str] | None:
    """A command that prints a cubin's machine code: CUDA's, or the one inside of Triton."""
    triton = importlib.util.find_spec("triton")
    inside = Path(triton.origin or "").parent / "backends" / "nvidia" / "bin" if triton else Path()
    for name, options in (("cuobjdump", ["-sass"]), ("nvdisasm", [])):
        found = shutil.which(name) or shutil.which(str(inside / name))
        if found:
            return [found, *options]
    return None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_kernels_load_128_bits(name: str, dtype: torch.dtype, compile_for: Compile, tmp_path: Path) -> None:
    """In the machine code, or where nothing disassembles in PTX."""
    text, cubin = definitions(kernel_for(HEAVIEST), name, dtype, 4, True), tmp_path / "kernel.cubin"
    disassembler = _disassembler()
    if disassembler is not None:
        compile_for(text, "sm_90", cubin)
        code = subprocess.run([*disassembler, str(cubin)], capture_output=True, text=True, check=True).stdout
        wide = r"LDG\.E\.128"
    elif shutil.which("nvcc"):
        code, wide = _ptx(text, tmp_path), r"ld\.global\.(v4\.\w32|v2\.\w64)"
    else:
        pytest.skip("needs cuobjdump, nvdisasm (CUDA, or the package triton) or nvcc, and there is none of them")
    steps = 4 if name in ("FORWARD", "BACKWARD") else 1
    assert len(re.findall(wide, code)) >= steps


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_no_fused_multiply_add_and_no_flush_to_zero(tmp_path: Path) -> None:
    """Contraction would round once where the reference rounds twice."""
    code = _ptx(definitions(kernel_for(HEAVIEST), "BACKWARD", torch.float32, 4, True), tmp_path)
    assert "mul.f32" in code or "mul.rn.f32" in code
    assert not re.findall(r"fma\.rn\.f32|\.ftz", code)
