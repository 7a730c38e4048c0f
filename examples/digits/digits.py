"""What both networks share: the images, the training and the record of a run."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from spikelm.encoding import firing_rate, sparsity
from spikelm.neurons.base import check_count, check_positive
from spikelm.presets import to_dict
from spikelm.run import RunDirectory, versions

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Settings:
    """Fields of both networks: steps of training come from the preset, T, the steps of a network, from its script."""

    output_dir: str
    steps: int
    T: int
    seed: int = 0
    batch_size: int = 64
    learning_rate: float = 1e-2


def images() -> list[torch.Tensor]:
    """Images in 0..1 [N, 64] and labels [N]: 1198 for training, 599 for testing, the same ones for every seed."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=1 / 3, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in split)
    return [train_x.float() / 16, train_y, test_x.float() / 16, test_y]


def train_and_record(
    config: Settings, network: Callable[[partial[nn.Module]], nn.Module], neuron: partial[nn.Module]
) -> dict[str, Any]:
    """Train network(neuron), which maps images [N, 64] to logits [N, 10], and write what came of it to metrics.json.

    A run that is already there is read, not repeated.
    """
    for name in ("steps", "T", "batch_size"):
        check_count(name, getattr(config, name))
    check_positive("learning_rate", config.learning_rate)
    with RunDirectory(config.output_dir, to_dict(config)) as run:
        if run.path("metrics.json").exists():
            metrics: dict[str, Any] = run.read_json("metrics.json")
            return metrics
        torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other
        torch.manual_seed(config.seed)
        net = network(neuron)
        start = time.monotonic()
        train(net, config)
        seconds = time.monotonic() - start
        metrics = {
            "test_accuracy": accuracy(net),
            "seconds": round(seconds, 2),
            "steps": config.steps,
            "neuron_arguments": neuron.keywords,
            "firing": firing(net, neuron.func),
            "parameters": sum(parameter.numel() for parameter in net.parameters()),
            "config": to_dict(config),
            "versions": versions() | {name: importlib.metadata.version(name) for name in ("snntorch", "scikit-learn")},
        }
        run.write_json("metrics.json", metrics)
    return metrics


def train(net: nn.Module, config: Settings) -> None:
    """Adam with a cosine schedule on the cross-entropy of random batches."""
    x, labels, _, _ = images()
    optimiser = torch.optim.Adam(net.parameters(), config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    net.train()
    progress = tqdm(range(config.steps), desc=f"seed {config.seed}")
    for step in progress:
        batch = torch.randint(len(x), (config.batch_size,))
        loss = F.cross_entropy(net(x[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 10 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """Share of the test images that are classified correctly."""
    _, _, x, labels = images()
    return (net.eval()(x).argmax(1) == labels).double().mean().item()


@torch.no_grad()
def firing(net: nn.Module, neuron_class: Any) -> dict[str, dict[str, float]]:
    """Per layer of neurons, over the test images and all steps: the mean of |s|, and the share of s other than 0."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        spikes = output[0] if isinstance(output, tuple) else output  # snnTorch's also return the membrane
        seen.setdefault(name, []).append(spikes)

    for name, module in net.named_modules():
        if isinstance(module, neuron_class):
            module.register_forward_hook(partial(watch, name))
    net.eval()(images()[2])
    layers = {name: torch.cat(spikes) for name, spikes in seen.items()}
    return {
        name: {"rate": round(firing_rate(spikes).mean().item(), 4), "nonzero": round(1 - sparsity(spikes), 4)}
        for name, spikes in layers.items()
    }


def print_result(metrics: dict[str, Any]) -> None:
    """One line on stdout."""
    rates = ", ".join(f"{name} {layer['rate']:.3f}" for name, layer in metrics["firing"].items())
    print(f"{metrics['config']['neuron']}: test accuracy {metrics['test_accuracy']:.2%}, mean |s| {rates}")
