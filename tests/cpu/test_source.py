"""The kernels' source: no access outside a tensor, and no line that could be wrong without a test going red."""

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from spikelm.cpu import attention, launch, module, spike_linear
from spikelm.ops.dynamics import Dynamics
from tests.kernel_cases import NIGHTLY, Case, dynamics, kernel_for
from tests.kernel_checks import changed, check_sequence, check_sum

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
TERNARY_FIRST = dynamics("ternary", "soft", "ATAN", first=True)


# ---- mutants: the kernel, how it is called, and one change


def sequence(
    dynamic: Dynamics, dtype: torch.dtype = F32, T: int = 3, *shapes: tuple[int, ...], **options: object
) -> Case:
    frame, threshold = shapes or ((5, 1025), (1025,))
    return Case(dynamic, dtype, T, frame, threshold, **options)  # type: ignore[arg-type]


PLAIN = sequence(dynamics("binary", "soft", "ATAN"), with_v=True)
STRIDED = sequence(
    dynamics("binary", "soft", "ATAN"), F32, 3, (4, 3, 40), (), layout="swapped", grad_layout="batch first"
)
HARD = sequence(dynamics("ternary", "hard", "TRIANGLE", first=True), with_v=True)
DELAYED = sequence(dynamics("ternary", "soft_delayed", "TRIANGLE"), with_v=True)
INTEGER = sequence(dynamics("integer", "soft"), with_v=True, special=False)
IN_BF16 = sequence(TERNARY_FIRST, BF16)
COUNTS = sequence(dynamics("integer", "soft", decay=2000.0, levels=100_000), BF16, 2)  # odd ones above 256 are ties
CHANNELS = sequence(dynamics("binary", "soft", "ATAN"), F32, 3, (7, 3, 50), (3, 1))
MANY = sequence(dynamics("binary", "soft", "ATAN"), F32, 3, (40, 900), (900,))
SHARED = sequence(dynamics("ternary", "soft", "ATAN", first=True, decay=0.5), F32, 3, (5, 1025), ())
STARTED = sequence(TERNARY_FIRST, F32, 3, started=True)

MUTANTS: dict[str, tuple[Case, bool, str, str]] = {  # (case, whether it is a sum, what reads so, what it becomes)
    "a sign in the gradient": (PLAIN, False, "grad_spikes - carry * V", "grad_spikes + carry * V"),
    "a threshold that fires no tie": (PLAIN, False, "return h >= V ? one", "return h > V ? one"),
    "one element less": (PLAIN, False, "if (j < n) body(j, n - j)", "if (j < n) body(j, n - j - 1)"),
    "sums that are not cleared": (MANY, False, "std::fill(carried.threshold, carried.threshold + padded,", "(void)(0,"),
    "the wrong channel's sum": (CHANNELS, False, "channels[channel] += sum;", "channels[0] += sum;"),
}
NIGHTLY_MUTANTS: dict[str, tuple[Case, bool, str, str]] = {
    "a sign in the reset": (PLAIN, False, "return {h, s, h - s * V};", "return {h, s, h + s * V};"),
    "decay of the gradient": (PLAIN, False, "? grad_h : grad_h * n.decay", "? grad_h : grad_h"),
    "a sign in the threshold's gradient": (PLAIN, False, "at_threshold - at_h * y", "at_threshold + at_h * y"),
    "no share of the reset": (PLAIN, False, "at_threshold = -(s * carry);", ""),
    "the mask's slope": (HARD, False, "return {up + down, up - down};", "return {up + down, up + down};"),
    "a sign in the hard reset": (HARD, False, "(n.v_reset - finite)", "(n.v_reset + finite)"),
    "the delayed reset": (DELAYED, False, "h = h - fire(v, V, n) * V;", "h = h - fire(h, V, n) * V;"),
    "the membrane before a delayed reset": (DELAYED, False, "if (a.grad_v || (delayed && a.grad_threshold))", "if (0)"),
    "rounding of counts": (INTEGER, False, "constant<R>(0.5);", "constant<R>(0.4);"),
    "levels": (INTEGER, False, "absolute(y) <= n.levels ?", "absolute(y) < n.levels ?"),
    "bfloat16 to even": (COUNTS, False, "bits + 0x7fff + ((bits >> 16) & 1)", "bits + 0x8000"),
    "the strides of x": (STRIDED, False, "a.sizes[axis] * a.x_strides[axis]", "a.sizes[axis] * a.grad_strides[axis]"),
    "the strides of the gradient": (
        STRIDED, False, "a.sizes[axis] * a.grad_strides[axis]", "a.sizes[axis] * a.x_strides[axis]",
    ),
    "the order of the axes": (STRIDED, False, "int axis = 3; axis >= 0; --axis", "int axis = 0; axis < 4; ++axis"),
    "a chunk left out": (MANY, False, "chunk < chunks; ++chunk) total", "chunk + 1 < chunks; ++chunk) total"),
    "a tile left out": (MANY, False, "i = chunk * tiles.count / chunks;", "i = chunk * tiles.count / chunks + 1;"),
    "the next channel": (CHANNELS, False, "channel = row || channel + 1 ==", "channel = row || channel + 2 =="),
    "input that enters twice": (STARTED, False, "if (!once || (t == 0 && !a.started))", "if (t == 0)"),
    "weights of the sum": (IN_BF16, True, "std::pow(base, (double)t)", "std::pow(base, (double)t + 1)"),
    "weights of the sum's gradient": (IN_BF16, True, "sum ? weights[t] : 1", "sum ? weights[0] : 1"),
    "a threshold scaled the wrong way": (SHARED, True, ": 1, 1 / a.decay,", ": 1, a.decay,"),
    "the sign of the sum": (IN_BF16, True, "with_sign_of(total[i], x[i])", "total[i]"),
}  # fmt: skip
CHOSEN = MUTANTS | (NIGHTLY_MUTANTS if NIGHTLY else {})


def checks_of(case: Case, is_sum: bool) -> Callable[[], None]:
    if is_sum:
        return partial(check_sum, launch, case, 0.3)
    return partial(check_sequence, launch, case)


@pytest.mark.usefixtures("poisoned", "fresh")
@pytest.mark.parametrize(("case", "is_sum", "old", "new"), CHOSEN.values(), ids=CHOSEN)
def test_a_changed_line_is_noticed(
    case: Case, is_sum: bool, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = checks_of(case, is_sum)
    check()
    module._LOADED.clear()
    source = module.source
    monkeypatch.setattr(module, "source", lambda *key: changed(source(*key), old, new))
    with pytest.raises(AssertionError, match=r"differ|off by|not close"):
        check()


# ---- AddressSanitizer


def sanitized(text: str, folder: Path, calls: str = "every_size.cpp") -> subprocess.CompletedProcess[str]:
    """Compiles the text with a program that calls it under AddressSanitizer, and runs it."""
    program, path = module.compiler(), folder / "main.cpp"
    assert program is not None
    path.write_text(text + Path(__file__).with_name(calls).read_text())
    flags = ["-std=c++17", "-O1", "-g", "-march=native", "-fopenmp", "-w", "-fsanitize=address,undefined"]
    built = subprocess.run(
        [program, *flags, "-fno-sanitize-recover=all", str(path), "-o", str(folder / "main")],
        capture_output=True,
        text=True,
    )
    if built.returncode and ("asan" in built.stderr or "sanitize" in built.stderr):
        pytest.skip(f"{program} has no AddressSanitizer: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr[-2000:]
    environment = {"ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    return subprocess.run([folder / "main"], capture_output=True, text=True, env=environment)


SANITIZED = {"float32": (PLAIN.dynamics, F32), "bfloat16": (TERNARY_FIRST, BF16)} | (
    {"float64": (HARD.dynamics, F64), "float16": (DELAYED.dynamics, torch.float16)} if NIGHTLY else {}
)


@pytest.mark.parametrize(("dynamic", "dtype"), SANITIZED.values(), ids=SANITIZED)
def test_nothing_outside_a_tensor_is_touched(dynamic: Dynamics, dtype: torch.dtype, tmp_path: Path) -> None:
    done = sanitized(module.source(kernel_for(Case(dynamic)).definitions, dtype, dtype), tmp_path)
    assert done.returncode == 0, done.stderr[:2000]


OUTSIDE = {  # a write and, nightly, a read of whole vectors behind the last element
    "write": ("store_spikes(spikes + j, at.spikes, count,", "store_spikes(spikes + j, at.spikes, All{},")
} | (
    {
        "read": ("grads ? load(grads + j, count) * weight", "grads ? load(grads + j, All{}) * weight"),
        "row": ("std::min<long long>(size, a.length - offset)", "std::min<long long>(size, a.length - offset + 1)"),
    }
    if NIGHTLY
    else {}
)


@pytest.mark.parametrize(("old", "new"), OUTSIDE.values(), ids=OUTSIDE)
def test_an_access_outside_is_found(old: str, new: str, tmp_path: Path) -> None:
    done = sanitized(changed(module.source(kernel_for(PLAIN).definitions, F32, F32), old, new), tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


# The attention and the packing of spikes: as they are, and with a read or a write behind the last element.
BITS = {
    "attention": ("attention.cpp", "", ""),
    "packing": ("packing.cpp", "", ""),
    "words": ("packing.cpp", "before | bit : before, count", "before | bit : before, All{}"),
} | (
    {
        "keys": ("attention.cpp", "(long)(keys - key));", "All{});"),
        "sums": ("attention.cpp", "store(to, real(sums[i][k]), last)", "store(to, real(sums[i][k]), All{})"),
    }
    if NIGHTLY
    else {}
)


@pytest.mark.parametrize(("file", "old", "new"), BITS.values(), ids=BITS)
def test_bits_outside_a_tensor_are_not_touched(file: str, old: str, new: str, tmp_path: Path) -> None:
    kernel = attention.definitions(kernel_for(DELAYED).definitions.replace("TERNARY", "BINARY"), 2, 37)
    text = module.source(kernel if file == "attention.cpp" else "", F32, F32, file)
    calls = file.replace(".cpp", "_sizes.cpp")
    done = sanitized(changed(text, old, new) if old else text, tmp_path, calls)
    assert (done.returncode != 0) == bool(old), done.stderr[:2000]
    assert ("ERROR: AddressSanitizer" in done.stderr) == bool(old)


# Projections of spikes: (form, weights, input, what reads so, what it becomes).
PROJECTIONS = {
    "numbers": ("float", BF16, F32, "", ""),
    "codes": ("ternary", torch.uint8, BF16, "", ""),
    "outputs": (
        "binary", torch.uint8, F32, "scale, bias, call), count);", "scale, bias, call), All{});",
    ),
} | (
    {
        "bytes": ("int8", torch.int8, BF16, "", ""),
        "bits": ("binary", torch.uint8, F32, "", ""),
        "rows": ("float", F32, F32, "weights_at(row[r] + j, count)", "weights_at(row[r] + j, All{})"),
        "registers": ("ternary", torch.uint8, F32, "from + width <= to", "from < to"),
        "thresholds": ("int8", torch.int8, F32, "threshold + first, some)", "threshold + first, All{})"),
    }
    if NIGHTLY
    else {}
)  # fmt: skip


@pytest.mark.parametrize(("form", "weights", "io", "old", "new"), PROJECTIONS.values(), ids=PROJECTIONS)
def test_nothing_outside_of_a_projection_is_touched(
    form: str, weights: torch.dtype, io: torch.dtype, old: str, new: str, tmp_path: Path
) -> None:
    kernel = spike_linear.definitions(kernel_for(INTEGER).definitions, True, weights, form)
    text = module.source(kernel, io, io, "spike_linear.cpp")
    done = sanitized(changed(text, old, new) if old else text, tmp_path, "spike_linear_sizes.cpp")
    assert (done.returncode != 0) == bool(old), done.stderr[:2000]
    assert ("ERROR: AddressSanitizer" in done.stderr) == bool(old)
