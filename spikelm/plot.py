"""Figures, each one PNG: a raster of spikes, a neuron's response, loss curves, firing rates by layer and site."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from spikelm.neurons import DynamicsNode

# Logged with the losses, but not losses.
NOT_LOSSES = (
    "step",
    "epoch",
    "learning_rate",
    "threshold_learning_rate",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "num_input_tokens_seen",
    "total_flos",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "train_loss",
    "wall_s",
    "skipped_updates",
)


def raster(
    frames: torch.Tensor,
    path: str | Path,
    *,
    tokens: Sequence[str] | None = None,
    x_label: str | None = None,
    title: str = "Spikes",
    max_channels: int = 96,
) -> Path:
    """Draw signed spikes, frames [T, L, C] or their value per token [L, C], red for positive and blue for negative.

    Time runs to the right: tokens, and the T internal steps within each. `tokens` are the L labels, `x_label` says what
    else L counts. The spikes of one sample of a network with time on axis 0, [T, N, *], are
    `raster(spikes[:, sample].flatten(1), path, x_label="time step")`. Of more than `max_channels` channels the first
    are shown, and the axis says so. Returns the path.
    """
    if frames.dim() == 2:
        frames = frames[None]
    if frames.dim() != 3 or 0 in frames.shape:
        raise SpikelmError(f"a raster is drawn of spikes [T, L, C] or [L, C], {list(frames.shape)} was given")
    steps, length, channels = frames.shape
    if tokens is not None and len(tokens) != length:
        raise SpikelmError(f"the raster has {length} tokens, {len(tokens)} labels were given")
    shown = min(channels, max_channels)
    image = frames.detach().float().cpu().permute(2, 1, 0).reshape(channels, length * steps)[:shown]
    top = max(1.0, image.abs().max().item())

    width = min(16.0, max(6.0, 2.0 + 0.045 * length * steps + 0.12 * length))
    figure = _new_figure(width, min(8.0, 2.2 + 0.055 * shown))
    axes = figure.subplots()
    picture = axes.imshow(
        image.numpy(),
        cmap="bwr",
        vmin=-top,
        vmax=top,
        aspect="auto",
        interpolation="nearest",
        extent=(0, length, shown, 0),
    )
    if length <= 100:
        for token in range(1, length):
            axes.axvline(token, color="0.85", linewidth=0.6)
    axes.set_xlabel(x_label or ("token" if steps == 1 else f"token, {steps} internal steps each"), parse_math=False)
    axes.set_ylabel("channel" if shown == channels else f"channel (first {shown} of {channels})")
    if tokens is not None:
        every = math.ceil(length / 100)
        places = range(0, length, every)
        labels = _labels([tokens[place] for place in places])
        axes.set_xticks([place + 0.5 for place in places], labels, rotation=90, fontsize=8, parse_math=False)
    rate = (frames != 0).float().mean().item()
    axes.set_title(f"{title}: {100 * rate:.1f} % of {frames.numel()} neuron steps fire", parse_math=False)
    bar = figure.colorbar(picture, ax=axes, pad=0.01, fraction=0.03)
    bar.set_label("spike")
    bar.set_ticks([-top, 0, top])
    return _save(figure, path)


def response(
    neurons: "DynamicsNode | Mapping[str, DynamicsNode]",
    path: str | Path,
    *,
    steps: int | None = None,
    channel: int = 0,
    low: float = -5.0,
    high: float = 5.0,
    title: str = "Response and surrogate gradient",
) -> Path:
    """Draw what a neuron makes of inputs from low to high, and below it the derivative that training uses.

    Several neurons, {label: neuron}, share the figure. Both curves, `steps` and `channel` are those of
    :func:`response_curve`. Returns the path.
    """
    named = neurons if isinstance(neurons, Mapping) else {type(neurons).__name__: neurons}
    if not named or not low < high:
        raise SpikelmError(f"a response needs a neuron and low < high; got {len(named)} neurons, {low} and {high}")
    x = torch.linspace(low, high, 2001)
    curves = {label: response_curve(neuron, x, steps=steps, channel=channel) for label, neuron in named.items()}
    figure = _new_figure(7.0, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    for place, (label, curve) in enumerate(curves.items()):
        for axes, values in zip((above, below), curve, strict=True):
            # Later ones are thinner, so that equal stretches show both.
            axes.plot(x.numpy(), values.numpy(), label=label, linewidth=max(0.9, 4.0 - 1.6 * place))
            axes.grid(True, color="0.92", linewidth=0.6)
    above.set_ylabel("output of one encoding" if steps is None else f"sum of the spikes of {steps} steps")
    above.locator_params(axis="y", integer=True)
    below.set_ylabel("d output / d input")
    below.set_xlabel("input" if steps is None else "input, the same at every step")
    above.set_title(title, parse_math=False)
    if len(named) > 1:
        above.legend(fontsize=8)
    return _save(figure, path)


def response_curve(
    neuron: "DynamicsNode", x: torch.Tensor, *, steps: int | None = None, channel: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, d output / d x by autograd) of a spikelm neuron at every value of x [points]; both [points].

    Args:
        steps: the output is the sum of the spikes of so many steps from a fresh membrane, each of which gets x.
            None: it is one encoding, `neuron.encode_sum(x)`, which ATMN and TILIF have.
        channel: whose threshold, for a neuron with `num_channels`.

    The neuron's memories are neither read nor changed. Whether it is in training mode counts, as for TILIF's `sgc`.
    """
    if not hasattr(neuron, "materialize_states"):
        raise SpikelmError(f"response takes a neuron of spikelm.neurons; got {type(neuron).__module__}")
    if steps is None and not hasattr(neuron, "encode_sum"):
        raise SpikelmError(f"{type(neuron).__name__} has no encode_sum: give steps, the number of steps that get x")
    if steps is not None and steps < 1:
        raise SpikelmError(f"steps must be >= 1, or None for one encoding; got {steps}")
    if not 0 <= channel < (neuron.num_channels or 1):
        raise SpikelmError(f"channel must be within 0..{(neuron.num_channels or 1) - 1}; got {channel}")
    with torch.enable_grad():
        x = x.detach().to("cpu" if neuron.a is None else neuron.a.device).requires_grad_()
        inputs = _on_every_channel(x, neuron)
        if steps is None:
            output = neuron.encode_sum(inputs)
        else:
            x_seq = inputs.expand(steps, *inputs.shape)
            fresh = neuron.materialize_states((x_seq,), tuple(neuron._memories_rv.values()), "m")
            (spikes,), _ = neuron.multi_step_functional_forward((x_seq,), fresh)
            output = spikes.sum(0)
        if neuron.num_channels is not None:
            output = output.select(neuron.channel_dim, channel)
        (gradient,) = torch.autograd.grad(output.sum(), x)
    return output.detach().flatten().cpu(), gradient.cpu()


def loss_curves(logs: Mapping[str, str | Path], path: str | Path, terms: Sequence[str] | None = None) -> Path:
    """One panel per log, titled by its key: every logged loss against the training step (log.jsonl: dicts with "step").

    terms: draw these of the logged numbers, not every loss.
    Raises SpikelmError for a log that is missing, damaged or without losses. Returns the path.
    """
    if not logs:
        raise SpikelmError("no log was given to draw loss curves of")
    curves = {title: read_losses(log, terms) for title, log in logs.items()}
    figure = _new_figure(min(16.0, 1.0 + 5.0 * len(curves)), 4.0)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (title, losses) in zip(panels, curves.items(), strict=True):
        for name, (steps, values) in losses.items():
            # The sum that is trained stands out from its terms.
            main = name == "loss"
            axes.plot(
                steps,
                values,
                label=name,
                linewidth=1.8 if main else 1.1,
                color="black" if main else None,
                marker="o" if len(steps) < 15 else None,
                markersize=3,
            )
        if all(value > 0 for _, values in losses.values() for value in values):
            axes.set_yscale("log")
            _plain_log_ticks(axes)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss" if terms is None else "")
        axes.set_title(title, parse_math=False)
        axes.grid(True, which="both", color="0.92", linewidth=0.6)
        axes.legend(fontsize=8)
    return _save(figure, path)


def read_losses(log: str | Path, terms: Sequence[str] | None = None) -> dict[str, tuple[list[float], list[float]]]:
    """{name: (steps, values)} of every finite number in a JSON-lines log that is a loss, or in terms; "loss" first."""
    log = Path(log)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    try:
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    except FileNotFoundError as error:
        raise SpikelmError(f"log {log} does not exist") from error
    except ValueError as error:
        raise SpikelmError(f"log {log} is no JSON-lines file: {error}") from error
    for row in rows:
        for name, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            wanted = name not in NOT_LOSSES if terms is None else name in terms
            if "step" in row and number and wanted:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    if not curves:
        raise SpikelmError(f"log {log} holds no losses: lines such as {{'step': 1, 'loss': 2.0}} are drawn")
    return dict(sorted(curves.items(), key=lambda item: item[0] != "loss"))


def firing_heatmap(
    statistics: Mapping[str, Any], path: str | Path, *, rate: str = "sum_of_rates", title: str = "Firing rates"
) -> Path:
    """Layers against sites, coloured by a rate of `spikelm.evaluate.firing_statistics`; a cell shows its number.

    `rate` is sum_of_rates (mean spikes per neuron, summed over the internal steps), union_rate or positive_rate; or
    firing_rate, for the populations of `spikelm.evaluate.population_statistics`.
    Sites outside of the layers, such as an output head, share the row "other". Returns the path.
    """
    units = {
        "sum_of_rates": "spikes per neuron, summed over steps",
        "union_rate": "share of neurons that fire in any step",
        "positive_rate": "positive spikes per neuron, summed over steps",
        "firing_rate": "spikes per neuron and step",
    }
    if rate not in units:
        raise SpikelmError(f"rate={rate}: accepted are {', '.join(units)}")
    cells = {_layer_and_site(name): site[rate] for name, site in statistics["sites"].items()}
    if not cells:
        raise SpikelmError("the statistics hold no sites to draw")
    layers = sorted({layer for layer, _ in cells}, key=lambda layer: (layer is None, layer or 0))
    sites = list(dict.fromkeys(site for _, site in cells))
    grid = torch.full((len(layers), len(sites)), math.nan)
    for (layer, site), value in cells.items():
        grid[layers.index(layer), sites.index(site)] = value

    figure = _new_figure(min(16.0, 2.5 + 1.3 * len(sites)), min(12.0, 1.9 + 0.38 * len(layers)))
    axes = figure.subplots()
    largest = max(max(cells.values()), 1e-12)
    picture = axes.imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=largest, aspect="auto", interpolation="nearest")
    for (layer, site), value in cells.items():
        axes.text(
            sites.index(site),
            layers.index(layer),
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color="black" if value > 0.6 * largest else "white",
        )
    axes.set_xticks(range(len(sites)), sites, rotation=20, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(layers)), ["other" if layer is None else str(layer) for layer in layers])
    axes.set_xlabel("population" if rate == "firing_rate" else "site (projection that receives the spikes)")
    axes.set_ylabel("layer")
    axes.set_title(title, parse_math=False)
    figure.colorbar(picture, ax=axes).set_label(units[rate])
    return _save(figure, path)


def pareto(
    curves: Mapping[str, Sequence[tuple[float, float, str]]], path: str | Path, *, x_label: str, y_label: str
) -> Path:
    """Cost against quality: one line per name, its points (x, y, label); y on a logarithmic scale. Returns the path."""
    if not any(curves.values()):
        raise SpikelmError("pareto needs at least one point")
    figure = _new_figure(7.0, 4.6)
    axes = figure.subplots()
    for name, points in curves.items():
        x, y, labels = zip(*sorted(points), strict=True)
        axes.plot(x, y, marker="o", markersize=4, label=name)
        for position in zip(x, y, labels, strict=True):
            axes.annotate(position[2], position[:2], textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_yscale("log")
    _plain_log_ticks(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, which="both", color="0.92", linewidth=0.6)
    axes.legend(fontsize=8)
    return _save(figure, path)


def against_steps(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    path: str | Path,
    *,
    y_label: str,
    level: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> Path:
    """One line per name over the time steps T (logarithmic), its points (T, value); ``level``: dashed, by name."""
    if not any(curves.values()):
        raise SpikelmError("against_steps needs at least one point")
    figure = _new_figure(6.4, 4.2)
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    for number, (name, value) in enumerate((level or {}).items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=str(0.2 + 0.3 * number), label=name)
    axes.set_xscale("log", base=2)
    steps = sorted({T for points in curves.values() for T, _ in points})
    axes.set_xticks(steps, [str(T) for T in steps])
    if logarithmic:
        axes.set_yscale("log")
        _plain_log_ticks(axes)
    axes.set_xlabel("time steps T")
    axes.set_ylabel(y_label)
    axes.grid(True, which="both", color="0.92", linewidth=0.6)
    axes.legend(fontsize=8)
    return _save(figure, path)


def _on_every_channel(x: torch.Tensor, neuron: "DynamicsNode") -> torch.Tensor:
    """x [points] as one step's input, with an axis on which each of the neuron's channels gets all of x."""
    channels, axis = neuron.num_channels, neuron.channel_dim
    if channels is None:
        return x
    if axis < 0:
        return x.view(-1, *[1] * -axis).expand(-1, channels, *[1] * (-axis - 1))
    return x.view(*[1] * (axis + 1), -1).expand(*[1] * axis, channels, -1)


def _layer_and_site(name: str) -> tuple[int | None, str]:
    """("backbone.layers.3.mixer.in_proj") -> (3, "mixer.in_proj"); no numbered part: (None, name)."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part.isdecimal():
            return int(part), ".".join(parts[place + 1 :])
    return None, name


def _labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as an axis shows them: blanks made visible, what the font lacks replaced, long ones cut."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    drawable = get_font(findfont(FontProperties())).get_charmap()
    labels = []
    for token in tokens:
        visible = "".join("␣" if character.isspace() else character for character in token)
        visible = "".join(
            character if ord(character) in drawable else "\N{REPLACEMENT CHARACTER}" for character in visible
        )
        labels.append(visible if len(visible) <= 12 else visible[:11] + "…")
    return labels


def _plain_log_ticks(axes: "Axes") -> None:
    """Numbers such as 0.5 and 2 on a logarithmic axis that may span less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _new_figure(width: float, height: float) -> "Figure":
    """A figure of its own (inches), outside of pyplot's list of open ones."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: str | Path) -> Path:
    """Write the PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        FigureCanvasAgg(figure).print_figure(partial, format="png", dpi=120)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path
