"""BinaryOperands on plain modules; tests/models/test_bispikclm.py has it on the model that it is for."""

import pytest
import torch
from torch import nn

from spikelm.energy import BinaryOperands
from spikelm.errors import SpikelmError


class Attention(nn.Module):
    """One product of two activations behind one of an activation and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spikes = (self.project(x) > 0).float()
        return spikes @ spikes.transpose(-1, -2)


def binary() -> torch.Tensor:
    return (torch.arange(24).view(2, 3, 4) % 3 == 0).float()


def test_counts_what_it_has_looked_at() -> None:
    model = Attention()
    for grad in (False, True):
        with BinaryOperands(model) as operands, torch.set_grad_enabled(grad):
            model(binary())
        assert operands.checked == {"aten::addmm": 1, "aten::bmm": 1}


@pytest.mark.parametrize("value", [-1.0, 0.5, 2.0, float("nan")])
def test_refuses_what_is_no_spike(value: float) -> None:
    x = binary()
    x[1, 2, 3] = value
    model = Attention()
    with pytest.raises(SpikelmError, match=r"aten::addmm in project of .* must have an operand in \{0, 1\}"):
        with BinaryOperands(model):
            model(x)


def test_the_head_is_left_out() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 5)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    with BinaryOperands(WithHead()) as operands:
        operands.model(torch.randn(3, 4))
    assert not operands.checked


def test_products_that_are_not_looked_into_are_refused() -> None:
    x = torch.rand(1, 2, 3, 4)
    for module, given in ((nn.Conv1d(3, 3, 1), (binary(),)), (Fused(), (x, x, x))):
        with pytest.raises(SpikelmError, match="its operands are not looked at"), BinaryOperands(module):
            module(*given)


class Fused(nn.Module):
    """Attention in one operator."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)
