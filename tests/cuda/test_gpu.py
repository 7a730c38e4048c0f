"""The CUDA kernels on a GPU: the cases of the shim, and what only a GPU has."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from spikelm.cpu import spike_linear as cpu_spike_linear
from spikelm.cuda import launch, module, spike_linear
from spikelm.ops import spike_linear as operation
from spikelm.ops.kernel import Kernel
from spikelm.ops.spike_linear import Encoder, SpikeWeights
from tests import attention_cases, spike_linear_cases
from tests.conftest import REPOSITORY
from tests.cuda import test_attention, test_spike_linear
from tests.cuda.cases import name_of, neurons, sums, ways
from tests.cuda.checks import bits_equal, check, check_rounding, check_sum, run
from tests.kernel_cases import Case, draw, dynamics, kernel_for

pytestmark = pytest.mark.gpu

PROJECTIONS = [*spike_linear_cases.CASES, test_spike_linear.PARTS, test_spike_linear.NUMBERS]
WIDE = spike_linear_cases.Case("ternary", "expansion", 4, 4096, (4096, 1024), dtype=torch.bfloat16)
LONG = attention_cases.Case(B=2, L=200, num_keys=1030, H=3, threshold=4.0)
PLAIN = Case(dynamics("ternary", "soft_delayed", "TRIANGLE"), frame=(600, 40), threshold=(40,), with_v=True)


@pytest.fixture(autouse=True)
def available() -> None:
    """Skips the tests, saying why, where no kernel can run."""
    reason = module.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("case", neurons(), ids=name_of)
def test_every_neuron(case: Case, poisoned: None) -> None:
    check(case, "cuda")


@pytest.mark.parametrize("case", ways(), ids=name_of)
def test_every_way_through_the_driver(case: Case, poisoned: None) -> None:
    check(case, "cuda")


@pytest.mark.parametrize(("case", "frame_weight"), sums(), ids=name_of)
def test_weighted_sums(case: Case, frame_weight: float, poisoned: None) -> None:
    check_sum(case, frame_weight, "cuda")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits(dtype: torch.dtype) -> None:
    check_rounding(dtype, "cuda")


def test_spikes_in_int8(poisoned: None) -> None:
    check(replace(PLAIN, dtype=torch.bfloat16), "cuda", torch.int8)


def test_subnormal_numbers_are_kept() -> None:
    x = torch.full((1, 4), 1e-40, device="cuda")
    threshold = torch.ones((), device="cuda")
    _, v_last = launch.forward(kernel_for(PLAIN), x, None, threshold, 1, torch.float32, 0.0, False, True)
    assert v_last is not None
    assert torch.equal(v_last.cpu(), torch.full((4,), 1e-40))


@pytest.mark.parametrize("case", [*test_attention.CASES, LONG], ids=attention_cases.name_of)
def test_spiking_attention(case: attention_cases.Case) -> None:
    attention_cases.check(case, "cupy", "cuda")


@pytest.mark.parametrize("case", [*PROJECTIONS, WIDE], ids=spike_linear_cases.name_of)
def test_projections_of_spikes(case: spike_linear_cases.Case) -> None:
    spike_linear_cases.check(case, spike_linear.project, "cuda")


@pytest.mark.parametrize("form", ["float", "int8", "binary", "ternary"])
def test_projections_as_on_the_cpu(form: str) -> None:
    """The public function; codes are counted, so that their sums are equal bit for bit."""
    case = spike_linear_cases.Case(form, tokens=2, channels=2048, outputs=(1000,))
    (on_gpu, _), (on_cpu, _) = (
        spike_linear_cases.run(spike_linear_cases.draw(case, device), backend)
        for device, backend in (("cuda", _public), ("cpu", cpu_spike_linear.project))
    )
    if form in spike_linear_cases.PACKED:
        assert torch.equal(on_gpu.y[0].cpu(), on_cpu.y[0])
    else:
        torch.testing.assert_close(on_gpu.y[0].cpu(), on_cpu.y[0], rtol=1e-5, atol=1e-3)


def _public(
    kernel: Kernel,
    encoder: Encoder,
    x: torch.Tensor,
    weights: Sequence[SpikeWeights],
    y: Sequence[torch.Tensor],
    most: int,
) -> int:
    """spikelm.ops.spike_linear.project in the words of a backend."""
    for result, found in zip(y, operation.project(x, encoder, weights, backend="cupy"), strict=True):
        result.copy_(found)
    return 0


def test_projections_have_the_same_bits_every_time() -> None:
    inputs = spike_linear_cases.draw(WIDE, "cuda")
    first, *others = (spike_linear_cases.run(inputs, spike_linear.project)[0].y for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("form", ["float", "ternary"])
def test_projections_in_a_captured_graph(form: str) -> None:
    """Replayed on other input, of which other channels and another number of them are active."""
    case = replace(WIDE, form=form)
    inputs = spike_linear_cases.draw(case, "cuda")
    spike_linear_cases.run(inputs, spike_linear.project)  # which builds the kernels
    results, graph = spike_linear_cases.Results(inputs), torch.cuda.CUDAGraph()
    x, encoder, weights = inputs
    assert isinstance(encoder.dynamics.kernel, Kernel)
    with torch.cuda.graph(graph):
        spike_linear.project(encoder.dynamics.kernel, encoder, x, weights, results.y, x.shape[-1])
    for rate in (0.9, 0.0, 1.0, 0.1):
        x.copy_(spike_linear_cases.draw(replace(case, rate=rate)).x)
        graph.replay()
        results.check(inputs)


def test_projections_on_the_current_stream() -> None:
    """The input is there only after the stream has waited."""
    inputs, stream = spike_linear_cases.draw(WIDE, "cuda"), torch.cuda.Stream()
    spike_linear_cases.run(inputs, spike_linear.project)
    late = inputs._replace(x=torch.zeros_like(inputs.x))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.x.copy_(inputs.x)
        results, _ = spike_linear_cases.run(late, spike_linear.project)
    assert not stream.query()  # nothing waited for it
    stream.synchronize()
    results.check(inputs)


@pytest.mark.parametrize("threshold", [(), (40,), (6000, 1)])
@pytest.mark.parametrize("T", [4, 33])
def test_the_same_bits_every_time(T: int, threshold: tuple[int, ...]) -> None:
    """With more neurons than threads that have scratch memory."""
    case = replace(PLAIN, T=T, frame=(6000, 40), threshold=threshold)
    first = run(case, "cuda")
    assert all(run(case, "cuda").equal(first) for _ in range(10))


def test_on_the_current_stream() -> None:
    """The input is there only after the stream has waited."""
    inputs, kernel, expected = draw(PLAIN, "cuda"), kernel_for(PLAIN), run(PLAIN, "cuda")
    x, stream = torch.zeros_like(inputs.x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(inputs.x)
        spikes, v_last = launch.forward(kernel, x, inputs.v, inputs.threshold, 4, x.dtype, 0.0, False, True)
    assert not stream.query()  # nothing waited for it
    stream.synchronize()
    assert v_last is not None
    assert bits_equal(spikes.cpu(), expected.spikes)
    assert bits_equal(v_last.cpu(), expected.v_last)


def test_in_a_captured_graph() -> None:
    """Forward, backward with scratch memory and three kernels; replayed on other input."""
    case = replace(PLAIN, T=33, threshold=())
    inputs, kernel, expected = draw(case, "cuda"), kernel_for(case), run(case, "cuda")  # which builds the kernels
    x = torch.zeros_like(inputs.x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        spikes, v_last = launch.forward(kernel, x, inputs.v, inputs.threshold, 33, x.dtype, 0.0, False, True)
        grads = launch.backward(
            kernel, x, inputs.v, inputs.threshold, 33, inputs.grad_spikes, inputs.grad_v_last, 0.0, False, True, True
        )
    x.copy_(inputs.x)
    graph.replay()
    for found, name in zip((spikes, v_last, *grads), vars(expected), strict=True):
        assert found is not None
        assert bits_equal(found.cpu(), getattr(expected, name)), name


def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; torch sees one")
    assert run(PLAIN, "cuda:1").equal(run(PLAIN, "cuda:0"))


def test_a_frame_of_more_than_two_to_the_31_neurons() -> None:
    rows = 2**28 + 3
    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GiB of free GPU memory")
    x = torch.tensor([0.25, -1.5, 1.0, -1.0, 0.75, 3.0, -0.5, 1.25], device="cuda", dtype=torch.bfloat16)
    threshold = torch.ones((), device="cuda")
    spikes, _ = launch.forward(
        kernel_for(PLAIN), x.expand(1, rows, 8), None, threshold, 1, torch.int8, 0.0, False, False
    )
    expected = torch.tensor([0, -1, 1, -1, 0, 1, 0, 1], device="cuda", dtype=torch.int8)
    for part in spikes[0].split(2**24):
        assert torch.equal(part, expected.expand_as(part))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which is not on the PATH")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", __file__]
    names = ("weighted_sums", "spikes_in_int8", "spiking_attention", "projections_of_spikes")
    chosen = ["-k", " or ".join(f"test_{name}" for name in names), "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *chosen], cwd=REPOSITORY, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
