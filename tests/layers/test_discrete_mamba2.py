"""DiscreteMamba2: its own mixing matrix, caches, padding, geometry."""

import pytest
import torch
import torch.nn.functional as F

from spikelm.errors import SpikelmError
from spikelm.layers import DiscreteMamba2
from spikelm.models.llamba import LlambaConfig
from spikelm.models.llamba.cache import LlambaCache


def mixer(n_qk_heads: int = 2, activation: str = "identity", **arguments: object) -> DiscreteMamba2:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = DiscreteMamba2(
            16,
            d_state=5,
            n_qk_heads=n_qk_heads,
            n_v_heads=4,
            chunk_size=4,
            activation=activation,
            layer_idx=0,
            **arguments,
        )
        for parameter in (layer.D, layer.z_bias):
            if parameter is not None:
                torch.nn.init.normal_(parameter)
    return layer.double().eval().requires_grad_(False)


def hidden(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def cache() -> LlambaCache:
    return LlambaCache(LlambaConfig(vocab_size=8, d_model=16, n_layer=1))


GEOMETRIES = [(n_qk_heads, activation) for n_qk_heads in (1, 2, 4) for activation in ("identity", "silu")]


@pytest.mark.parametrize(("n_qk_heads", "activation"), GEOMETRIES)
@pytest.mark.parametrize("expand", [1, 2])
def test_forward_is_the_mixing_matrix_applied_to_x(n_qk_heads: int, activation: str, expand: int) -> None:
    layer, u = mixer(n_qk_heads, activation, expand=expand), hidden(11)
    xBC, z, _ = layer.in_proj(u).split([layer.conv_dim, layer.d_inner, 4], dim=-1)
    xBC = layer.conv1d(xBC.transpose(1, 2))[..., :11].transpose(1, 2)  # torch's own convolution
    x = (xBC if activation == "identity" else F.silu(xBC))[..., : layer.d_inner].unflatten(-1, (4, -1))
    matrix = layer.mixing_matrix(u)
    assert matrix.shape == (2, 4, 11, 11)
    assert torch.equal(matrix, matrix.tril())
    y = (matrix @ x.transpose(1, 2)).transpose(1, 2).flatten(-2)
    expected = layer.out_proj(y * F.silu(z + layer.z_bias))
    torch.testing.assert_close(layer(u), expected, rtol=1e-12, atol=1e-12)


def test_mixing_matrix_by_hand() -> None:
    """(i, j) = C_i . B_j exp(-sum_{j<k<=i} softplus(A_log_k)) + D [i = j], heads of a group sharing B and C."""
    layer, u = mixer(2), hidden(5, batch=1)
    _, log_decay, _, B, C = layer._project(u, None, None)
    A_log = layer.in_proj(u)[..., -4:]
    torch.testing.assert_close(log_decay, -F.softplus(A_log))
    matrix = layer.mixing_matrix(u)[0]
    for h in range(4):
        for i in range(5):
            for j in range(i + 1):
                decay = torch.exp(-F.softplus(A_log[0, j + 1 : i + 1, h]).sum())
                expected = (C[0, i, h // 2] @ B[0, j, h // 2]) * decay + (layer.D[h] if i == j else 0)
                torch.testing.assert_close(matrix[h, i, j], expected)


def test_mixing_matrix_is_differentiable() -> None:
    layer = mixer().requires_grad_(True)
    layer.mixing_matrix(hidden(6)).square().sum().backward()
    assert float(layer.in_proj.weight.grad[-4:].abs().min()) > 0  # the decays
    assert float(layer.D.grad.abs().min()) > 0
    assert layer.out_proj.weight.grad is None


@pytest.mark.parametrize(("n_qk_heads", "activation"), GEOMETRIES)
def test_token_by_token_equals_the_whole(n_qk_heads: int, activation: str) -> None:
    layer, u, states = mixer(n_qk_heads, activation), hidden(9), cache()
    one_by_one = torch.cat([layer(u[:, i : i + 1], past_key_values=states) for i in range(9)], 1)
    torch.testing.assert_close(one_by_one, layer(u), rtol=1e-12, atol=1e-12)
    assert states.get_seq_length() == 9


@pytest.mark.parametrize("cuts", [[9], [1, 8], [2, 3, 4], [5, 1, 3], [8, 1]])
def test_prefill_in_parts_equals_the_whole(cuts: list[int]) -> None:
    layer, u, states = mixer(), hidden(9), cache()
    parts = torch.cat([layer(part, past_key_values=states) for part in u.split(cuts, 1)], 1)
    torch.testing.assert_close(parts, layer(u), rtol=1e-12, atol=1e-12)


def states_after(
    layer: DiscreteMamba2, u: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, scan state)."""
    kept = cache()
    y = layer(u, past_key_values=kept, attention_mask=mask)
    return y, kept.layers[0].recurrent_states[0]


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_left_padding_changes_nothing(activation: str) -> None:
    layer, u = mixer(activation=activation), hidden(7)
    mask = torch.ones(2, 10)
    mask[:, :3] = 0
    y, state = states_after(layer, torch.cat([hidden(3), u], 1), mask)
    expected_y, expected_state = states_after(layer, u, None)
    torch.testing.assert_close(y[:, 3:], expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_right_padding_leaves_the_state(activation: str) -> None:
    layer, u = mixer(activation=activation), hidden(7)
    mask = torch.ones(2, 10)
    mask[:, 7:] = 0
    y, state = states_after(layer, torch.cat([u, hidden(3)], 1), mask)
    expected_y, expected_state = states_after(layer, u, None)
    torch.testing.assert_close(y[:, :7], expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


def test_mixing_matrix_ignores_padding() -> None:
    layer, u = mixer(), hidden(7)
    mask = torch.ones(2, 10)
    mask[:, :3] = 0
    padded = layer.mixing_matrix(torch.cat([hidden(3), u], 1), mask)
    torch.testing.assert_close(padded[..., 3:, 3:], layer.mixing_matrix(u))
    assert torch.equal(padded[..., 3:, :3], torch.zeros(2, 4, 7, 3, dtype=torch.float64))


def test_it_is_causal() -> None:
    layer, u = mixer(), hidden(9)
    changed = u.clone()
    changed[:, 6] += 1
    before, after = layer(u), layer(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert float((before[:, 6:] - after[:, 6:]).abs().min()) > 0


def test_names_and_shapes_are_the_published_ones() -> None:
    layer = DiscreteMamba2(2048)  # Llamba-1B
    assert {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()} == {
        "in_proj.weight": (8224, 2048),
        "z_bias": (2048,),
        "conv1d.weight": (6144, 1, 4),
        "conv1d.bias": (6144,),
        "D": (32,),
        "out_proj.weight": (2048, 2048),
    }


def test_bias_replaces_z_bias() -> None:
    names = set(mixer(bias=True, conv_bias=False).state_dict())
    assert names == {"in_proj.weight", "in_proj.bias", "conv1d.weight", "D", "out_proj.weight", "out_proj.bias"}
    assert mixer(bias=True, conv_bias=False)(hidden(5)).shape == (2, 5, 16)


def test_bfloat16_keeps_close_and_decodes() -> None:
    layer, u = mixer().float(), hidden(64).float()
    exact = layer(u)
    half, states = mixer().bfloat16(), cache()
    outputs = [half(u.bfloat16()[:, :60], past_key_values=states)]
    outputs += [half(u.bfloat16()[:, i : i + 1], past_key_values=states) for i in range(60, 64)]
    y = torch.cat(outputs, 1)
    assert y.dtype == torch.bfloat16
    assert states.layers[0].recurrent_states[0].dtype == torch.float32
    assert float((y.float() - exact).norm() / exact.norm()) < 0.02


def test_no_tokens() -> None:
    assert mixer()(hidden(0)).shape == (2, 0, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_v_heads": 3, "n_qk_heads": 3}, "n_v_heads must divide .*d_model=16, expand=1, n_v_heads=3"),
        ({"n_v_heads": 4, "n_qk_heads": 3}, "n_qk_heads must divide n_v_heads.*n_qk_heads=3"),
        (
            {"n_v_heads": 4, "n_qk_heads": 4, "activation": "relu"},
            "activation must be 'identity' or 'silu'; got 'relu'",
        ),
    ],
)
def test_bad_geometry_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        DiscreteMamba2(16, **arguments)


def test_the_kernel_gets_the_undiscretised_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba_ssm's scan discretises x by dt; what we hand to it must undo that. The stand-in is plain torch."""
    from spikelm.layers import discrete_mamba2
    from spikelm.ops.ssd import ssd_recurrent

    def kernel(x, dt, A, B, C, chunk_size, initial_states=None, return_final_states=False):
        assert return_final_states
        return ssd_recurrent(x * dt.unsqueeze(-1), dt * A, B, C, initial_states)

    layer, u = mixer().float(), hidden(9).float()
    mask = torch.ones(u.shape[:2])
    mask[0, :4] = 0  # padding has dt = 0
    _, log_decay, x, B, C = layer._project(u, None, mask)
    expected = layer._scan(x, log_decay, B, C, None)
    monkeypatch.setattr(discrete_mamba2, "mamba_chunk_scan_combined", kernel)
    fake = type(
        "Fake",
        (),
        {"is_cuda": True, "dtype": x.dtype, "device": x.device, "__truediv__": lambda self, other: x / other},
    )()
    y, state = layer._scan(fake, log_decay, B, C, None)
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected[1], rtol=1e-5, atol=1e-6)
