"""Figures: the pixels that must be there, whole files only, clear refusals."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spikelm import plot
from spikelm.errors import SpikelmError
from spikelm.neurons import ATMN, TILIF, BinaryIF, DynamicsNode
from spikelm.plot import firing_heatmap, loss_curves, raster, read_losses, response, response_curve

matplotlib = pytest.importorskip("matplotlib")


def pixels(path: Path) -> Any:
    """RGB values [height, width, 3] in 0..1."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


def share_of(image: Any, colour: tuple[float, float, float]) -> float:
    """Share of the pixels that have exactly this colour."""
    return float((abs(image - colour) < 0.01).all(-1).mean())


RED, BLUE = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)


def test_raster_shows_signs_by_colour(tmp_path: Path) -> None:
    frames = torch.zeros(4, 6, 10)
    silent = pixels(raster(frames, tmp_path / "silent.png"))
    frames[:, :, :5] = 1
    positive = pixels(raster(frames, tmp_path / "positive.png"))
    negative = pixels(raster(-frames, tmp_path / "negative.png"))
    assert share_of(positive, RED) > share_of(silent, RED) + 0.2
    assert share_of(negative, BLUE) > share_of(silent, BLUE) + 0.2
    assert share_of(positive, BLUE) == pytest.approx(share_of(silent, BLUE), abs=0.01)
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"] * 3


def test_raster_puts_tokens_right_and_channels_down(tmp_path: Path) -> None:
    frames = torch.zeros(2, 8, 8)
    frames[:, 6:, :2] = 1  # last tokens, first channels: above right
    image = pixels(raster(frames, tmp_path / "corner.png", tokens=list("abcdefgh")))
    height, width = image.shape[:2]
    corner = share_of(image[: height // 2, width // 2 : int(0.85 * width)], RED)
    assert corner > 0.1
    assert share_of(image[height // 2 :, : width // 2], RED) == 0


def test_raster_takes_values_per_token_and_odd_tokens(tmp_path: Path) -> None:
    spikes = torch.tensor([[2.0, -1.0], [0.0, 1.0], [0.0, 0.0], [-2.0, 0.0]])
    tokens = ["a $b$", "\n", "猫\x00", "a very long token indeed"]
    assert raster(spikes, tmp_path / "values.png", tokens=tokens).stat().st_size > 1000
    assert raster(spikes.bfloat16().requires_grad_(), tmp_path / "half.png", max_channels=1).exists()


def test_raster_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match=r"\[T, L, C\] or \[L, C\], \[3\] was given"):
        raster(torch.zeros(3), tmp_path / "x.png")
    with pytest.raises(SpikelmError, match=r"\[0, 3, 3\] was given"):
        raster(torch.zeros(0, 3, 3), tmp_path / "x.png")
    with pytest.raises(SpikelmError, match="3 tokens, 2 labels"):
        raster(torch.zeros(1, 3, 3), tmp_path / "x.png", tokens=["a", "b"])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved, in order."""
    figures = []
    save = plot._save
    monkeypatch.setattr(plot, "_save", lambda figure, path: (figures.append(figure), save(figure, path))[1])
    return figures


def test_raster_says_what_runs_to_the_right(tmp_path: Path, drawn: list[Any]) -> None:
    raster(torch.ones(3, 5, 2), tmp_path / "frames.png")
    raster(torch.ones(5, 2), tmp_path / "values.png")
    spikes = torch.zeros(7, 4, 2, 3)  # time, samples, channels, places
    spikes[5, 1, 0, 1] = 1
    raster(spikes[:, 1].flatten(1), tmp_path / "network.png", x_label="time step $t", title="One sample")
    assert [figure.axes[0].get_xlabel() for figure in drawn] == [
        "token, 3 internal steps each",
        "token",
        "time step $t",
    ]
    (image,) = drawn[2].axes[0].get_images()
    assert image.get_array().shape == (6, 7)  # neurons down, time to the right
    assert image.get_array().nonzero() == ([1], [5])
    assert drawn[2].axes[0].get_title() == "One sample: 2.4 % of 42 neuron steps fire"


def atan(x: torch.Tensor) -> torch.Tensor:
    """Derivative of ATan(alpha=2)."""
    return 1 / (1 + (torch.pi * x).square())


@pytest.mark.parametrize("T", [1, 4])
def test_response_of_atmn_is_its_count_and_a_bump_at_each_threshold(T: int) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    neuron = ATMN(v_threshold=2.0, T=T, learn_threshold=False)  # a learned one is exp(a), 2 but for rounding
    output, gradient = response_curve(neuron, x)
    torch.testing.assert_close(output, x.sign() * (x.abs() / 2).floor().clamp(max=T))
    if T == 1:
        torch.testing.assert_close(gradient, (atan(x / 2 - 1) + atan(x / 2 + 1)) / 2)
    torch.testing.assert_close(response_curve(neuron, x, steps=T), (output, gradient))


@pytest.mark.parametrize("sgc", [None, "gradient", "blend"])
def test_response_of_tilif_is_rounding_and_its_window(sgc: Any) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    neuron = TILIF(D=3, sgc=sgc, sgc_weight=0.25)
    rounded, smooth = x.sign() * (x.abs() + 0.5).floor().clamp(max=3), 3 * (x / 3).tanh()
    window, slope = (x.abs() <= 3).double(), 1 - (x / 3).tanh().square()
    weight = 0.25 if sgc else 0.0
    output, gradient = response_curve(neuron, x)
    torch.testing.assert_close(output, 0.75 * rounded + 0.25 * smooth if sgc == "blend" else rounded)
    torch.testing.assert_close(gradient, (1 - weight) * window + weight * slope)
    torch.testing.assert_close(response_curve(neuron.eval(), x), (rounded, window))


def test_response_of_binary_if_are_the_rates_of_a_constant_current() -> None:
    x = torch.tensor([0.3, 0.5, 0.7, 1.0, 2.0])
    neuron = BinaryIF(beta=0.9, reset_delay=True)
    output, gradient = response_curve(neuron, x, steps=4)
    assert (output / 4).tolist() == [0.25, 0.25, 0.5, 0.75, 1.0]  # papers/bispikclm.md
    assert (response_curve(neuron, x, steps=2)[0] / 2).tolist() == [0, 0, 0.5, 0.5, 1.0]
    torch.testing.assert_close(response_curve(neuron, x, steps=1)[1], atan(x - 1))
    assert gradient.gt(0).all()


@pytest.mark.parametrize("channel_dim", [-1, -3, 0, 1])
@pytest.mark.parametrize("steps", [None, 2])
def test_response_of_a_channel_uses_its_threshold(channel_dim: int, steps: int | None) -> None:
    neuron = TILIF(D=2, num_channels=3, channel_dim=channel_dim)
    neuron.v_threshold = torch.tensor([0.5, 1.0, 4.0])
    x = torch.linspace(-5, 5, 41)
    for channel, V in enumerate((0.5, 1.0, 4.0)):
        expected = response_curve(TILIF(D=2, v_threshold=V), x, steps=steps)
        torch.testing.assert_close(response_curve(neuron, x, steps=steps, channel=channel), expected)


@pytest.mark.parametrize("create", [lambda: ATMN(T=2), lambda: BinaryIF(v_reset=0.5), lambda: TILIF(beta=0.5)])
def test_response_leaves_the_neuron_alone(create: Callable[[], DynamicsNode]) -> None:
    x, neuron = torch.linspace(-1, 1, 5), create()
    neuron(torch.full((3,), 0.7))
    memories, v = dict(neuron._memories), neuron.v.clone()
    with torch.no_grad():
        curves = response_curve(neuron, x, steps=3)
    torch.testing.assert_close(curves, response_curve(create(), x, steps=3))
    assert all(neuron._memories[name] is value for name, value in memories.items())
    assert neuron.v.equal(v)
    assert all(parameter.grad is None for parameter in neuron.parameters())


def test_response_draws_the_curves(tmp_path: Path, drawn: list[Any]) -> None:
    neurons = {"tau $1": ATMN(), "tau 0.5": ATMN(tau=0.5, frame_weight=0.5)}
    assert response(neurons, tmp_path / "two.png", low=-3, high=3).stat().st_size > 1000
    response(BinaryIF(), tmp_path / "one.png", steps=4)
    above, below = drawn[0].axes
    assert [line.get_label() for line in above.get_lines()] == list(neurons)
    for lines, neuron in zip(zip(above.get_lines(), below.get_lines(), strict=True), neurons.values(), strict=True):
        x = torch.as_tensor(lines[0].get_xdata())
        assert (x[0], x[-1]) == (-3, 3)
        for line, values in zip(lines, response_curve(neuron, x), strict=True):
            torch.testing.assert_close(torch.as_tensor(line.get_ydata()), values)
    assert drawn[1].axes[0].get_ylabel() == "sum of the spikes of 4 steps"
    assert drawn[1].axes[0].get_legend() is None


def test_response_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    with pytest.raises(SpikelmError, match="BinaryIF has no encode_sum: give steps"):
        response(BinaryIF(), path)
    with pytest.raises(SpikelmError, match="steps must be >= 1, or None for one encoding; got 0"):
        response(ATMN(), path, steps=0)
    with pytest.raises(SpikelmError, match=r"channel must be within 0\.\.2; got 3"):
        response(ATMN(num_channels=3), path, channel=3)
    with pytest.raises(SpikelmError, match=r"channel must be within 0\.\.0; got 1"):
        response(ATMN(), path, channel=1)
    with pytest.raises(SpikelmError, match="low < high; got 1 neurons, 2.0 and 2.0"):
        response(ATMN(), path, low=2.0, high=2.0)
    with pytest.raises(SpikelmError, match="needs a neuron"):
        response({}, path)
    assert list(tmp_path.iterdir()) == []


def write_log(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_losses_are_read_without_the_other_figures(tmp_path: Path) -> None:
    rows = [
        {"step": 10, "feature": 2.0, "loss": 3.0, "wall_s": 0.1, "note": "x", "flag": True},
        {"step": 20, "loss": 1.0, "grad_norm": 4.0, "feature": float("nan")},
        {"train_runtime": 5.0, "loss": 9.0},
    ]
    losses = read_losses(write_log(tmp_path / "log.jsonl", rows))
    assert losses == {"loss": ([10, 20], [3.0, 1.0]), "feature": ([10], [2.0])}
    assert list(losses) == ["loss", "feature"]
    assert read_losses(tmp_path / "log.jsonl", terms=["feature"]) == {"feature": ([10], [2.0])}


def test_loss_curves_draw_a_panel_per_log(tmp_path: Path) -> None:
    many = write_log(tmp_path / "a.jsonl", [{"step": i, "loss": 2.0 / i, "reverse_kl": 1.0 / i} for i in range(1, 50)])
    zero = write_log(tmp_path / "b.jsonl", [{"step": i, "loss": float(i - 1)} for i in range(1, 4)])
    one = pixels(loss_curves({"stage $1": many}, tmp_path / "one.png"))
    two = pixels(loss_curves({"stage 1": many, "stage 2": zero}, tmp_path / "two.png"))
    assert two.shape[1] > 1.5 * one.shape[1]
    assert share_of(one, (0, 0, 0)) > 0.001


def test_bad_logs_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match="no log was given"):
        loss_curves({}, tmp_path / "x.png")
    with pytest.raises(SpikelmError, match="absent.jsonl does not exist"):
        loss_curves({"a": tmp_path / "absent.jsonl"}, tmp_path / "x.png")
    with pytest.raises(SpikelmError, match="holds no losses"):
        loss_curves({"a": write_log(tmp_path / "none.jsonl", [{"step": 1, "epoch": 2}])}, tmp_path / "x.png")
    (tmp_path / "torn.jsonl").write_text('{"step": 1, "lo')
    with pytest.raises(SpikelmError, match="torn.jsonl is no JSON-lines file"):
        loss_curves({"a": tmp_path / "torn.jsonl"}, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def statistics(**rates: float) -> dict[str, Any]:
    return {
        "sites": {
            name.replace("__", "."): {"sum_of_rates": value, "union_rate": value / 2, "positive_rate": value / 3}
            for name, value in rates.items()
        }
    }


@pytest.mark.parametrize("rate", ["sum_of_rates", "union_rate", "positive_rate"])
def test_heatmap_is_brightest_where_neurons_fire_most(tmp_path: Path, rate: str) -> None:
    found = statistics(
        layers__0__mixer=0.0, layers__0__mlp=0.0, layers__10__mixer=0.0, layers__10__mlp=1.2, layers__2__mixer=0.0
    )
    image = pixels(firing_heatmap(found, tmp_path / "heat.png", rate=rate))
    height, width = image.shape[:2]
    yellow = (0.993, 0.906, 0.144)
    # Rows are layers 0, 2, 10 in this order, columns mixer, mlp: the one that fires is the last cell.
    assert share_of(image[height // 2 :, int(0.3 * width) : int(0.75 * width)], yellow) > 0.05
    assert share_of(image[: height // 3, : int(0.75 * width)], yellow) == 0


def test_heatmap_takes_silent_models_and_sites_outside_of_layers(tmp_path: Path) -> None:
    assert firing_heatmap(statistics(layers__0__mixer=0.0, lm_head=0.0), tmp_path / "silent.png").exists()


def test_heatmap_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    with pytest.raises(SpikelmError, match="rate=speed: accepted are sum_of_rates, union_rate, positive_rate"):
        firing_heatmap(statistics(layers__0__mixer=0.1), tmp_path / "x.png", rate="speed")
    with pytest.raises(SpikelmError, match="no sites"):
        firing_heatmap({"sites": {}}, tmp_path / "x.png")


def test_a_figure_that_cannot_be_saved_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        raster(torch.ones(1, 2, 2), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_no_global_figures(tmp_path: Path) -> None:
    raster(torch.ones(1, 2, 2), tmp_path / "x.png")
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []
