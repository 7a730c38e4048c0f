"""A data set whose items a neuron's kernel makes, for worker processes: little to import."""

import torch
from torch.utils.data import Dataset

from spikelm.neurons import ATMN


class SpikeDataset(Dataset[torch.Tensor]):
    """Item i: 64 thousand weighted sums of spikes, enough for a kernel to use every thread that it may."""

    def __init__(self) -> None:
        self.neuron = ATMN(T=4, tau=0.5, frame_weight=0.5)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        x = torch.randn(1 << 16, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            return self.neuron.encode_sum(x)
