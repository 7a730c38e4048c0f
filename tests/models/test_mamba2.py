"""transformers' own Mamba2ForCausalLM with TI-LIF before its projections."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mamba2ForCausalLM

from spikelm import Recipe, calibrate, spikify
from spikelm.convert import spike_sites
from spikelm.errors import SpikelmError
from spikelm.layers import SpikingLinear
from spikelm.neurons import TILIF
from tests.small_models import llamba, mamba2

IDS = torch.randint(3, 64, (2, 19), generator=torch.Generator().manual_seed(0))


def spiking(**arguments: object) -> Mamba2ForCausalLM:
    model = mamba2()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() == 2 else 1)  # so that its text varies
    spikify(model, Recipe.preset("spikingmamba", **arguments))
    calibrate(model, [{"input_ids": IDS}])
    return model


def test_the_neurons_stand_before_both_projections_of_every_mixer() -> None:
    model = spiking(D=3)
    assert list(spike_sites(model)) == [
        f"backbone.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj", "out_proj")
    ]
    seen: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(lambda m, inputs: seen.append(m.neuron.encode_sum(inputs[0])))
        for module in model.modules()
        if isinstance(module, SpikingLinear)
    ]
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    assert len(seen) == 4
    for spikes in seen:
        assert torch.equal(spikes, spikes.round()) and spikes.abs().max() == 3 and spikes.min() < 0


@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence() -> None:
    model = spiking()
    whole = model(IDS).logits
    output = model(IDS[:, :7], use_cache=True)
    steps = [output.logits]
    for token in IDS[:, 7:].split(1, dim=1):
        output = model(token, cache_params=output.cache_params, use_cache=True)
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))


def generate(model: Mamba2ForCausalLM, ids: torch.Tensor, **more: object) -> torch.Tensor:
    return model.generate(ids, min_new_tokens=12, max_new_tokens=12, do_sample=False, pad_token_id=0, **more)


def test_cached_generation_equals_uncached() -> None:
    model = spiking()
    cached = generate(model, IDS)
    assert torch.equal(cached, generate(model, IDS, use_cache=False))
    assert len(cached[0, 19:].unique()) > 2, "the text varies, so that equality says something"


def test_left_padding_changes_nothing() -> None:
    model = spiking()
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), IDS], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(IDS)], 1)
    with torch.no_grad():
        alone, together = model(IDS).logits, model(padded, attention_mask=mask).logits[:, 5:]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))
    assert torch.equal(generate(model, padded, attention_mask=mask)[:, 24:], generate(model, IDS)[:, 19:])


class Operators(TorchDispatchMode):
    """The names of every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [mamba2, llamba])
@pytest.mark.parametrize("sgc", ["gradient", "blend"])
@pytest.mark.filterwarnings("ignore:no kernel for sgc='blend'")
def test_compensation_is_in_the_training_graph_alone(make, sgc: str) -> None:  # type: ignore[no-untyped-def]
    compensated, plain = (spikify(make(), Recipe.preset("spikingmamba", sgc=kind)) for kind in (sgc, None))
    for model in (compensated, plain):
        calibrate(model, [{"input_ids": IDS}])
    recorded = []
    for model in (compensated, plain):
        with torch.no_grad(), Operators() as operators:
            logits = model.eval()(IDS).logits
        recorded.append((operators.names, logits))
    assert recorded[0][0] == recorded[1][0], "in eval mode operator by operator the model without compensation"
    assert torch.equal(recorded[0][1], recorded[1][1])
    training = compensated.train()(IDS).logits
    assert torch.equal(training, recorded[0][1]) == (sgc == "gradient"), "its gradient form changes no value"
    gradients = []
    for model in (compensated, plain):
        model.train().zero_grad()
        model(IDS, labels=IDS).loss.backward()
        gradients.append(spike_sites(model)[next(iter(spike_sites(model)))].weight.grad)
    assert not torch.equal(*gradients)


def test_wrong_models_and_neurons_are_refused() -> None:
    with pytest.raises(SpikelmError, match=r"pattern '\*.mixer.in_proj' matches no nn.Linear; the model has 0"):
        spikify(torch.nn.Sequential(torch.nn.Linear(2, 2)), "spikingmamba")
    with pytest.raises(SpikelmError, match="D must be an integer >= 1; got 0"):
        spikify(mamba2(), Recipe.preset("spikingmamba", D=0))
    model = mamba2()
    with pytest.raises(SpikelmError, match="do not fit TILIF"):
        spikify(model, Recipe.preset("spikingmamba", tau=0.5))
    assert not any(isinstance(module, SpikingLinear) for module in model.modules())


def test_training_and_inference_forms_agree_on_a_million_values() -> None:
    """s by rounding, s as the sum of D ternary micro-steps of the rounded value; and the trap, the literal micro-steps.

    The paper's recursion v[i] = v[i-1] - s[i-1] + x[i] from 0 with x[1] = |x| counts floor(|x|), clipped.
    """
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    neuron = TILIF(D=4)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = x.to(dtype)
        spikes, frames = neuron.encode_sum(values), neuron.encode(values)
        assert spikes.dtype == frames.dtype == dtype
        assert int((frames.sum(0) != spikes).sum()) == 0
        assert set(frames.unique().tolist()) == {-1, 0, 1}
        # the micro-steps with v[0] = 1/2, in float32, sign beside them
        v, count = values.float().abs() + 0.5, torch.zeros_like(x)
        for _ in range(4):
            fires = (v >= 1).float()
            v, count = v - fires, count + fires
        assert int((values.float().sign() * count != spikes.float()).sum()) == 0
    literal = x.sign() * x.abs().floor().clamp(max=4)
    share = (literal != neuron.encode_sum(x)).float().mean().item()
    assert share == pytest.approx(0.398, abs=0.002)


MEMORY = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, Mamba2Config, Mamba2ForCausalLM
import spikelm
torch.manual_seed(0)
config = Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64,
                      state_size=128, n_groups=1, expand=2, conv_kernel=4, chunk_size=64, tie_word_embeddings=True)
Mamba2ForCausalLM(config).save_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert 128e6 < sum(p.numel() for p in model.parameters()) < 130e6
ids = torch.randint(3, 50000, (1, 64))
spikelm.spikify(model, "spikingmamba")
spikelm.calibrate(model, [{"input_ids": ids}])
out = model.generate(ids[:, :8], min_new_tokens=8, max_new_tokens=8, do_sample=False)
assert out.shape == (1, 16)
before = model.backbone.layers[0].mixer.in_proj.weight.detach().clone()
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
loss = model(ids, labels=ids).loss
loss.backward()
optimizer.step()
assert torch.isfinite(loss) and not torch.equal(before, model.backbone.layers[0].mixer.in_proj.weight)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_model_of_130m_parameters_fits_into_6_gigabytes(tmp_path: Path, repository: Path) -> None:
    """Written by transformers, loaded, converted, calibrated, generates, trains one step with AdamW."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "mamba2-130m")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(done.stdout.splitlines()[-1])
    print(f"peak memory {peak / 1e9:.2f} GB")
    assert peak < 6e9
