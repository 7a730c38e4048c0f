"""One model for many: interleaved generation, eight threads, worker processes, and torch's deterministic mode."""

import functools
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import StoppingCriteria, StoppingCriteriaList

from spikelm import Recipe, calibrate, deploy, spikify
from spikelm.cpu import module
from spikelm.models.bispikclm import BiSpikCLMCache
from spikelm.models.llamba.cache import LlambaCache
from spikelm.neurons import ATMN, TILIF, BinaryIF
from tests.robustness.spike_dataset import SpikeDataset
from tests.small_models import bispikclm, llamba, mamba2, spikingbert

THREADS = 8
NEW_TOKENS = 6
GENERATE: dict[str, Any] = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
MODELS = ("llamba", "llamba gather", "llamba packed", "bispikclm", "mamba2", "mamba2 gather")


def prompt(seed: int, tokens: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (1, tokens or 4 + seed % 5), generator=torch.Generator().manual_seed(seed))


@functools.cache
def model_of(name: str) -> Any:
    """A small model; after a blank the form it is deployed in. Nothing here changes it."""
    kind, _, form = name.partition(" ")
    if kind == "bispikclm":
        return bispikclm()
    model: Any = llamba() if kind == "llamba" else mamba2()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() == 2 else 1)  # so that its text varies
    preset = "mar" if kind == "llamba" else "spikingmamba"
    spikify(model, Recipe.preset(preset, weights="ternary" if form == "packed" else "float"))
    calibrate(model, [{"input_ids": prompt(0, 32)}])
    return deploy(model, form) if form else model


def generate(model: Any, seed: int, **more: Any) -> torch.Tensor:
    ids = prompt(seed)
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **GENERATE, **more)


class Between(StoppingCriteria):
    """Calls something after every second token, and stops nothing."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] % 2:
            self.work()
        return torch.zeros(len(input_ids), dtype=torch.bool)


# ---- interleaved


@pytest.mark.parametrize("name", MODELS)
def test_a_generation_within_another_changes_neither(name: str) -> None:
    """After every second token of the one all of the other is generated."""
    model = model_of(name)
    outer, inner = generate(model, 1), generate(model, 2)
    assert len(outer[0, -NEW_TOKENS:].unique()) > 1
    found: list[torch.Tensor] = []
    stopping = StoppingCriteriaList([Between(lambda: found.append(generate(model, 2)))])
    assert torch.equal(generate(model, 1, stopping_criteria=stopping), outer)
    assert len(found) == NEW_TOKENS // 2
    assert all(torch.equal(one, inner) for one in found)


@pytest.mark.parametrize("name", ["llamba", "llamba gather", "llamba packed", "bispikclm"])
def test_caches_that_take_turns_do_not_mix(name: str) -> None:
    """Four texts, a token of each in turn, give the logits of each alone, bit for bit."""
    model = model_of(name)

    def steps(seed: int) -> Iterator[torch.Tensor]:
        cache = BiSpikCLMCache(2) if name == "bispikclm" else LlambaCache(model.config)
        yield model(prompt(seed, 5), past_key_values=cache, use_cache=True).logits[:, -1]
        for token in prompt(seed + 100, 6)[0]:
            yield model(token.view(1, 1), past_key_values=cache, use_cache=True).logits[:, -1]

    with torch.no_grad():
        alone = [list(steps(seed)) for seed in range(4)]
        together = list(zip(*(steps(seed) for seed in range(4)), strict=True))
    for i, turn in enumerate(together):
        assert all(torch.equal(logits, alone[seed][i]) for seed, logits in enumerate(turn))


# ---- threads


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """Python's threads take turns after ten microseconds instead of five milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    """work(i) in thread i of eight, all at once; raises what one of them raises."""
    together, results, failures = threading.Barrier(THREADS), [None] * THREADS, []

    def run(i: int) -> None:
        try:
            together.wait()
            results[i] = work(i)
        except Exception as error:  # of any class, to be shown in the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure
    return results


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.parametrize("name", ["llamba", "llamba gather", "llamba packed", "bispikclm", "mamba2 gather"])
def test_eight_threads_give_what_one_gives(name: str) -> None:
    model = model_of(name)
    expected = [generate(model, seed) for seed in range(THREADS)]
    for _ in range(2):
        for found, right in zip(in_threads(lambda seed: generate(model, seed)), expected, strict=True):
            assert torch.equal(found, right)


@pytest.mark.usefixtures("frequent_switches")
def test_eight_threads_on_a_classifier() -> None:
    model = spikingbert()
    with torch.no_grad():
        expected = [model(prompt(seed)).logits for seed in range(THREADS)]

    def logits(seed: int) -> torch.Tensor:
        with torch.no_grad():  # of this thread alone
            return model(prompt(seed)).logits

    for found, right in zip(in_threads(logits), expected, strict=True):
        assert torch.equal(found, right)


@pytest.mark.usefixtures("frequent_switches")
@pytest.mark.skipif(module.unavailable() is not None, reason="no compiler")
def test_eight_threads_that_all_need_the_same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded yet; one of them builds or finds it."""
    monkeypatch.setattr(module, "_LOADED", {})
    neuron, x = TILIF(D=3), torch.linspace(-4, 4, 999)
    right = TILIF(D=3, backend="torch").encode_sum(x)
    assert all(torch.equal(found, right) for found in in_threads(lambda i: neuron.encode_sum(x)))


# ---- worker processes


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_kernels_in_worker_processes(method: str) -> None:
    """Also after the parent has run them on several threads, whose OpenMP a forked child cannot use."""
    data, before = SpikeDataset(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [data[i] for i in range(len(data))]
        context = multiprocessing.get_context(method)
        loader = DataLoader(data, batch_size=1, num_workers=1, multiprocessing_context=context, timeout=60)
        found = list(loader)
    finally:
        torch.set_num_threads(before)
    assert len(found) == len(expected)
    assert all(torch.equal(one[0], right) for one, right in zip(found, expected, strict=True))


# ---- deterministic mode


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch's deterministic mode, in which memory that nobody has written to is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def gradients(name: str) -> list[torch.Tensor]:
    """The loss of a fresh spiking model in training, and every gradient."""
    if name == "spikingbert":
        model: Any = spikingbert(weights="ternary")
        loss = model.train()(prompt(1, 12), labels=torch.tensor([1])).loss
    else:
        model = {"llamba": llamba, "mamba2": mamba2, "bispikclm": bispikclm}[name]()
        if name != "bispikclm":
            spikify(model, Recipe.preset("mar" if name == "llamba" else "spikingmamba", learn_threshold=True))
        loss = model.train()(prompt(1, 12), labels=prompt(1, 12)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", ["llamba", "mamba2", "bispikclm", "spikingbert"])
def test_training_in_deterministic_mode(name: str, request: pytest.FixtureRequest) -> None:
    """Runs, gives the same twice, and what it gives without."""
    torch.manual_seed(0)
    plain = gradients(name)
    request.getfixturevalue("deterministic")
    for _ in range(2):
        torch.manual_seed(0)
        found = gradients(name)
        assert len(found) == len(plain)
        assert all(torch.equal(one, right) for one, right in zip(found, plain, strict=True))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["llamba gather", "llamba packed", "bispikclm"])
def test_generation_in_deterministic_mode(name: str) -> None:
    found = generate(model_of(name), 3)
    torch.use_deterministic_algorithms(False)
    assert torch.equal(found, generate(model_of(name), 3))


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("build", [ATMN, TILIF, BinaryIF])
def test_neurons_write_all_that_they_return(build: Any) -> None:
    """Odd sizes; what is left out would be NaN."""
    for shape in ((3, 1), (5, 63), (4, 1023)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        neuron = build(step_mode="m", learn_threshold=True)
        spikes = neuron(x)
        spikes.sum().backward()
        for tensor in (spikes, neuron.v, x.grad, neuron.a.grad):
            assert tensor is not None
            assert bool(tensor.isfinite().all())
