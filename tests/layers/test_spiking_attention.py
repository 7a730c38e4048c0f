"""SpikingSelfAttention: matrices against bits, its masks, and the slow loop of the paper's Algorithm 1."""

import pytest
import torch

from spikelm.errors import SpikelmError
from spikelm.layers import SpikingSelfAttention
from spikelm.layers.spiking_attention import StatelessBinaryIF, count
from spikelm.models.bispikclm import BiSpikCLMCache
from spikelm.neurons import BinaryIF
from spikelm.ops.spiking_attention import unpack_channels

T, B, L, D, H = 3, 2, 9, 24, 2


def attention(**arguments: object) -> SpikingSelfAttention:
    """Random, with weights large enough that every population fires."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = SpikingSelfAttention(D, H, layer_idx=0, **arguments).eval()
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        return layer


def spikes(length: int = L, rate: float = 0.4, steps: int = T) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return (torch.rand(steps, B, length, D, generator=generator) < rate).float()


def lif(current: list[float], threshold: float = 1.0, beta: float = 0.9) -> list[float]:
    """Eq. 1 of the paper, in Python numbers rounded to float32."""
    u = s = torch.tensor(0.0)
    out = []
    for value in current:
        u = value + beta * u - s * threshold
        s = (u >= threshold).float()
        out.append(float(s))
    return out


def by_loops(layer: SpikingSelfAttention, x: torch.Tensor, map_threshold: float) -> torch.Tensor:
    """Algorithm 1 with a Python loop over queries and keys; neurons by `lif` in the attention itself."""

    def population(values: torch.Tensor, threshold: float = 1.0) -> torch.Tensor:
        flat = values.reshape(len(values), -1)
        columns = [lif(column.tolist(), threshold) for column in flat.T]
        return torch.tensor(columns).T.reshape(values.shape)

    q, k, v = (population(getattr(layer, f"{name}_proj")(x)).unflatten(-1, (H, -1)) for name in "qkv")
    mixed = torch.zeros(q.shape)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                for j in range(i + 1):
                    overlap = [(q[t, b, i, h] * k[t, b, j, h]).sum().item() for t in range(T)]
                    for t, fired in enumerate(lif(overlap, map_threshold)):
                        mixed[t, b, i, h] += fired * v[t, b, j, h]
    return population(layer.out_proj(population(mixed.flatten(-2))))


@torch.no_grad()
@pytest.mark.parametrize("map_threshold", [1.0, 2.5])
def test_is_the_papers_algorithm(map_threshold: float) -> None:
    layer = attention(map_threshold=map_threshold)
    expected = by_loops(layer, spikes(), map_threshold)
    assert 0.02 < expected.mean() < 0.98
    assert torch.equal(layer(spikes())[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learn_threshold", [False, True])
def test_bits_and_matrices_give_the_same_spikes(dtype: torch.dtype, learn_threshold: bool) -> None:
    neuron = {"beta": 0.9, "reset_delay": True, "learn_threshold": learn_threshold}
    layer = attention(neuron=neuron).to(dtype)
    x = spikes(40).to(dtype)
    by_matrices, _ = layer(x)
    with torch.no_grad():
        by_bits, none = layer(x)
        with_maps, maps = layer(x, output_attentions=True)
    assert by_matrices.requires_grad and none is None and maps is not None
    assert torch.equal(by_bits, by_matrices) and torch.equal(by_bits, with_maps)
    assert maps.shape == (B, H, 40, 40) and torch.equal(maps, maps.tril())
    assert set((maps * T).round(decimals=4).unique().tolist()) <= {0, 1, 2, 3} or dtype != torch.float32


@pytest.mark.parametrize(("dtype", "length"), [(torch.bfloat16, 300), (torch.float16, 2100)])
def test_16_bit_holds_long_contexts(dtype: torch.dtype, length: int) -> None:
    """bfloat16 counts to 256 and float16 to 2048: sums beyond are formed in float32, and rounded."""
    layer, x = attention().to(dtype), spikes(length, 0.4, steps=1)[:, :1].to(dtype)
    by_matrices, _ = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x)[0], by_matrices)
        layer(x, output_attentions=True)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj", "map_neuron"])
def test_one_projection_alone_is_trained(trained: str) -> None:
    neuron = {"beta": 0.9, "reset_delay": True, "learn_threshold": True}
    layer = attention(neuron=neuron).requires_grad_(False)
    layer.get_submodule(trained).requires_grad_(True)
    layer(spikes())[0].sum().backward()
    for parameter in layer.get_submodule(trained).parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("output_attentions", [False, True])
def test_tokens_in_turn_give_what_all_at_once_give(output_attentions: bool) -> None:
    layer, x = attention(), spikes(70)
    cache = BiSpikCLMCache(1)
    parts = [
        layer(part, past_key_values=cache, output_attentions=output_attentions)[0]
        for part in x.split([33, 1, 1, 20, 15], dim=2)
    ]
    assert torch.equal(torch.cat(parts, dim=2), layer(x)[0])


def test_a_cached_past_leaves_gradients_to_what_is_new() -> None:
    layer, x = attention(), spikes()
    with torch.no_grad():
        layer(x[:, :, :4], past_key_values=(cache := BiSpikCLMCache(1)))
    out, _ = layer(x[:, :, 4:], past_key_values=cache)
    assert torch.equal(out, layer(x)[0][:, :, 4:])
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@torch.no_grad()
def test_padding_is_silent() -> None:
    layer, x = attention(), spikes()
    mask = torch.ones(B, L, dtype=torch.long)
    mask[0, :3] = 0
    for output_attentions in (False, True):
        assert torch.equal(layer(x, 2.0 * mask)[0], layer(x, mask)[0]), "what is not 0 is a token"
        out, _ = layer(x, mask, output_attentions=output_attentions)
        assert torch.equal(out[:, :1, 3:], layer(x[:, :1, 3:])[0])
        assert torch.equal(out[:, 1], layer(x)[0][:, 1])
    cache = BiSpikCLMCache(1)
    layer(x, mask, cache)
    assert not unpack_channels(cache.layers[0].keys[..., :L], D // H)[:, 0, :3].any()


def test_every_projection_gets_a_gradient() -> None:
    layer = attention()
    layer(spikes())[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_counts_are_exact(dtype: torch.dtype) -> None:
    """bfloat16 has no 257."""
    ones = torch.ones(2, 1027)
    assert count(ones.to(dtype), ones.T.to(dtype), 1027).float().tolist() == [[1027.0, 1027.0]] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert count(ones, ones.T, 1027).tolist() == [[1027.0, 1027.0]] * 2


def test_stateless_neuron_is_the_neuron_at_rest() -> None:
    x = torch.rand(4, 5, 6) * 2
    stateless, node = StatelessBinaryIF(beta=0.9, reset_delay=True), BinaryIF(0.9, reset_delay=True, step_mode="m")
    assert torch.equal(stateless(x), node(x))
    assert torch.equal(stateless(x), stateless(x))
    assert stateless.v == 0.0


@pytest.mark.parametrize(
    "neuron", [{"beta": 0.9}, {"reset_delay": False}, {"reset_delay": True, "num_channels": 3}, {"v_reset": 0.0}]
)
def test_refuses_neurons_that_the_bits_have_no_kernel_for(neuron: dict[str, object]) -> None:
    with pytest.raises(SpikelmError, match="neuron must have reset_delay=True and may have .*v_threshold; got {"):
        SpikingSelfAttention(24, 2, neuron)
    with pytest.raises(SpikelmError, match="beta must be within"):
        SpikingSelfAttention(24, 2, {"reset_delay": True, "beta": 1.1})


def test_refuses_heads_that_do_not_divide() -> None:
    with pytest.raises(SpikelmError, match="hidden_size must be a multiple of num_heads; got 10 and 3"):
        SpikingSelfAttention(10, 3)
