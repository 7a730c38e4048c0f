"""examples/spikingmamba from its command lines to what it leaves in output_dir."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SITES = {f"backbone.layers.{layer}.mixer.{name}" for layer in (0, 1) for name in ("in_proj", "out_proj")}


def metrics_of(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def test_metrics_hold_what_is_promised(finished_spikingmamba: Path) -> None:
    metrics = metrics_of(finished_spikingmamba)
    teacher, student, record = metrics["teacher"], metrics["student"], metrics["training"]["student"]
    assert 0 < teacher["ce"] < math.log(300), "the embedded teacher has learnt something"
    assert teacher["kl_to_teacher"] == 0 < student["kl_to_teacher"]
    assert metrics["ce_above_teacher"] == pytest.approx(student["ce"] / teacher["ce"] - 1)
    assert student["kl_to_teacher"] < record["at_conversion"]["kl_to_teacher"], "distillation helps"
    assert record["steps"] == 40 and record["sgc_weight"] == 0.3
    assert record["loss"] == pytest.approx(record["kl"] + record["hidden"], rel=1e-5)
    held_out = record["held_out_terms_without_sgc"]
    assert held_out["loss"] == pytest.approx(held_out["kl"] + held_out["hidden"], rel=1e-5)
    assert set(metrics["firing"]["sites"]) == SITES
    for site in metrics["firing"]["sites"].values():
        assert len(site["rate_per_step"]) == 4 and 0 <= site["saturation"] <= site["rate_per_step"][-1] < 0.5
    assert set(metrics["wall_s"]) == {"teacher", "student"} and metrics["versions"]["torch"]


def test_energy_shows_its_terms(finished_spikingmamba: Path) -> None:
    metrics = metrics_of(finished_spikingmamba)
    energy = metrics["energy"]
    assert "not measured" in energy["estimate"]
    projections, table = energy["projections"], energy["costs"]
    rates = {name: site["sum_of_rates"] for name, site in metrics["firing"]["sites"].items()}
    # 32 wide, expand 2, 16 states, 4 heads of 16: in_proj 32 x (64 + 64 + 2 * 16 + 4), out_proj 64 x 32
    macs = {name: 32 * 164 if name.endswith("in_proj") else 64 * 32 for name in rates}
    assert projections["mac"] == sum(macs.values())
    measured = sum(macs[name] * rate for name, rate in rates.items())
    assert projections["accumulations"] == pytest.approx(measured, rel=0.1), "of the first held-out contexts alone"
    expected = table["mac"] * projections["mac"] / (table["accumulation"] * projections["accumulations"])
    assert projections["benefit"] == pytest.approx(expected)
    assert 1 < energy["whole"]["benefit"] < projections["benefit"]
    whole = json.loads((finished_spikingmamba / "energy.json").read_text())
    assert set(whole["phases"]) == {"prefill", "decode"} and "teacher" in whole["phases"]["decode"]["energy"]
    assert energy == {key: value for key, value in whole.items() if key != "phases"}


def test_the_student_comes_back_with_frozen_embeddings(finished_spikingmamba: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from spikelm.convert import recipe_of, spike_sites
    from spikelm.neurons import TILIF

    teacher, student = (AutoModelForCausalLM.from_pretrained(finished_spikingmamba / n) for n in ("teacher", "student"))
    assert torch.equal(teacher.get_input_embeddings().weight, student.get_input_embeddings().weight)
    mixers = [model.backbone.layers[0].mixer.conv1d.weight for model in (teacher, student)]
    assert not torch.equal(*mixers)
    sites = spike_sites(student)
    assert set(sites) == SITES and all(isinstance(site.neuron, TILIF) for site in sites.values())
    assert recipe_of(student).calibrated and recipe_of(student).neuron_arguments["D"] == 4


def test_blend_is_annealed_and_the_student_remembers_it(
    spikingmamba: Any, finished_spikingmamba: Path, tmp_path: Path
) -> None:
    fields = {"teacher": finished_spikingmamba / "teacher", "neuron.sgc": "blend", "neuron.sgc_end": 0.5}
    assert spikingmamba.run(tmp_path / "run", fields) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/training/student/log.jsonl").read_text().splitlines()]
    weights = {line["step"]: line["sgc_weight"] for line in lines}
    assert weights[10] == pytest.approx(0.3 * (1 - 9 / 39 / 0.5))
    assert weights[20] == pytest.approx(0.3 * (1 - 19 / 39 / 0.5)) and weights[40] == 0
    config = json.loads((tmp_path / "run/student/config.json").read_text())
    assert config["quantization_config"]["recipe"]["neuron_arguments"]["sgc_weight"] == 0


def test_a_ternary_student_beside_its_packed_size(
    spikingmamba: Any, finished_spikingmamba: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from spikelm.convert import recipe_of, spike_sites

    assert "storage" not in metrics_of(finished_spikingmamba)
    fields = {"teacher": finished_spikingmamba / "teacher", "weights": "ternary"}
    assert spikingmamba.run(tmp_path / "run", fields) == 0
    metrics, student = metrics_of(tmp_path / "run"), AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert recipe_of(student).weights == "ternary"
    assert all(site.weights == "ternary" for site in spike_sites(student).values())
    assert metrics["student"]["kl_to_teacher"] < metrics["training"]["student"]["at_conversion"]["kl_to_teacher"]
    storage = metrics["storage"]
    assert storage["trained"]["file"] == (tmp_path / "run" / "student" / "model.safetensors").stat().st_size
    assert storage["packed"]["matrices"] < 0.2 * storage["trained"]["matrices"]


def test_a_teacher_that_is_no_mamba2_is_refused(
    spikingmamba: Any, finished: Path, finished_spikingmamba: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wrong = {
        finished / "teacher": "is a LlamaForCausalLM. examples/mar/train.py makes a Llamba",
        finished / "student": "is a LlambaForCausalLM with neurons",
        finished_spikingmamba / "student": "is a Mamba2ForCausalLM with neurons",
    }
    for teacher, message in wrong.items():
        assert spikingmamba.run(tmp_path / "run", {"teacher": teacher}) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


def test_it_starts_from_stage_1_of_mar(spikingmamba: Any, finished: Path, tmp_path: Path) -> None:
    fields = {"teacher": finished / "stage1", "distillation.optimisation.steps": 2}
    assert spikingmamba.run(tmp_path / "run", fields) == 0
    metrics = metrics_of(tmp_path / "run")
    assert set(metrics["firing"]["sites"]) == SITES
    terms = metrics["energy"]["terms"]
    assert terms["dense projections"]["mac"] > 0, "a Llamba's MLP stays dense, and is counted"


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("neuron.D=0", "D must be an integer >= 1; got 0"),
        ("distillation.kl_weight=-1", "kl_weight and hidden_weight must be finite, >= 0 and not both 0"),
        ("distillation.optimisation.steps=0", "distillation.optimisation: steps must be a whole number >= 1"),
        ("neuron.sgc=both", "neuron.sgc"),
        ("weights=int8", "weights"),
        ("per_row=true", "per_row must be a bool, and True only with quantised weights; got True with float"),
        ("neuron.sgc_end=0", "neuron.sgc_end must be within (0, 1], given 0"),
        ("distillation.max_sum_of_rates=0", "distillation.max_sum_of_rates must be > 0 or null, given 0"),
        ("distillation.calibration_contexts=0", "distillation.calibration_contexts must be at least 1, given 0"),
        (
            "distillation.optimisation.learning_rate=-1",
            "distillation.optimisation: learning_rate must be finite and > 0",
        ),
        ("distillation.optimisation.batch_size=0", "distillation.optimisation: batch_size must be a whole number >= 1"),
        ("distillation.optimisation.threshold_learning_rate=-1", "threshold_learning_rate must be finite and > 0"),
        ("evaluation_contexts=0", "evaluation_contexts must be at least 1, given 0"),
        ("streaming=true", "the embedded teacher takes data=embedded alone, without streaming"),
        ("data=missing.txt", "no such text: missing.txt"),
    ],
)
def test_wrong_fields_are_refused_before_anything_is_trained(
    spikingmamba: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], field: str, message: str
) -> None:
    name, _, value = field.partition("=")
    fields = {"data": "embedded", name: value} if name == "streaming" else {name: value}
    assert spikingmamba.run(tmp_path / "run", fields) == 2
    errors = capfd.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_preset_is_accepted(load_example: Callable[[str], ModuleType]) -> None:
    from spikelm.presets import load_config, preset_names

    train = load_example("spikingmamba/train.py")
    names = preset_names(train.PRESETS)
    assert names == ["mamba2_1b3", "mamba2_1b3_8gpu", "smoke", "tiny"]
    for name in names:
        config = load_config(train.Config, name, [], train.PRESETS)
        train.check(config)
        assert config.neuron.D == 4 and config.neuron.sgc == "gradient" and config.distillation.freeze_embeddings


@pytest.mark.filterwarnings("ignore:no kernel for sgc='blend'")
def test_ablation_has_every_row_and_trains_none_twice(
    spikingmamba: Any, finished: Path, finished_spikingmamba: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "ablation"
    fields = {"D": "[1, 4]", "seeds": "[0]", "optimisation.steps": 2, "optimisation.batch_size": 4}
    arguments = [f"run={finished_spikingmamba}", f"output_dir={output_dir}", *(f"{k}={v}" for k, v in fields.items())]
    assert spikingmamba.call("ablate.py", arguments) == 0
    results = json.loads((output_dir / "ablation.json").read_text())
    kl: dict[tuple[str, str], float] = {}
    for neuron in ("binary LIF", "integer LIF", "TI-LIF"):
        rows = {row["row"]["name"]: row for row in results[neuron]}
        assert list(rows) == [f"D = {D}, SGC {sgc}" for D in (1, 4) for sgc in ("off", "gradient", "blend")]
        for name, row in rows.items():
            kl[neuron, name] = row["kl_to_teacher"]
            assert 0 <= row["saturation"] < 1 and row["sum_of_rates"] > 0
    # after two steps it is the code that decides: more levels are better, and so are signs
    for neuron in ("integer LIF", "TI-LIF"):
        assert kl[neuron, "D = 4, SGC off"] < kl[neuron, "D = 1, SGC off"]
    assert kl["TI-LIF", "D = 4, SGC off"] < kl["integer LIF", "D = 4, SGC off"]
    assert (output_dir / "pareto.png").read_bytes().startswith(b"\x89PNG")

    table = (output_dir / "table.md").read_text()
    assert table.count("| D = ") == 18
    written = {path.name: path.stat().st_mtime_ns for path in output_dir.glob("row-*.json")}
    assert spikingmamba.call("ablate.py", arguments) == 0
    assert {path.name: path.stat().st_mtime_ns for path in output_dir.glob("row-*.json")} == written
    capfd.readouterr()
    changed = tmp_path / "changed"  # the same run, had it been configured otherwise
    shutil.copytree(finished_spikingmamba, changed)
    metrics = metrics_of(changed)
    metrics["config"]["distillation"]["hidden_weight"] = 2.0
    (changed / "metrics.json").write_text(json.dumps(metrics))
    assert spikingmamba.call("ablate.py", [f"run={changed}", *arguments[1:]]) == 2
    assert "already holds another run" in capfd.readouterr().err
    assert spikingmamba.call("ablate.py", [*arguments, "optimisation.learning_rate=-1"]) == 2
    assert "learning_rate must be finite and > 0" in capfd.readouterr().err
    assert spikingmamba.call("ablate.py", [f"run={finished}", f"output_dir={tmp_path / 'x'}"]) == 2
    assert "is not one of this example's train.py" in capfd.readouterr().err
    shutil.rmtree(output_dir)
    assert spikingmamba.call("ablate.py", [f"run={tmp_path}", f"output_dir={output_dir}"]) == 2
    assert capfd.readouterr().err.startswith("error: run must be the output_dir of a finished train.py with a student")


def test_the_ablations_neurons_are_what_they_say(load_example: Callable[[str], ModuleType]) -> None:
    import torch

    ablate = load_example("spikingmamba/ablate.py")
    x = torch.linspace(-6, 6, 999).unsqueeze(-1).requires_grad_()
    unsigned = ablate.UnsignedIntegerLIF(D=4, num_channels=1)
    assert torch.equal(unsigned.encode_sum(x), (x.detach() + 0.5).floor().clamp(0, 4))
    assert torch.equal(unsigned.encode(x).sum(0), unsigned.encode_sum(x))
    (slope,) = torch.autograd.grad(unsigned.encode_sum(x).sum(), x)
    assert torch.equal(slope, ((x > 0) & (x <= 4)).float())

    binary = ablate.BinaryLIF(D=4, num_channels=1, sgc="gradient")
    assert torch.equal(binary.encode_sum(x), x.detach().floor().clamp(0, 4)), "without a leak"
    binary.eval()
    (plain,) = torch.autograd.grad(binary.encode_sum(x).sum(), x)
    binary.train()
    (mixed,) = torch.autograd.grad(binary.encode_sum(x).sum(), x)
    smooth = torch.where(x > 0, 1 - (x / 4).tanh() ** 2, 0.0)
    torch.testing.assert_close(mixed, 0.7 * plain + 0.3 * smooth)
    binary.sgc = "blend"
    blended = 0.7 * x.detach().floor().clamp(0, 4) + 0.3 * 4 * (x.relu() / 4).tanh()
    torch.testing.assert_close(binary.encode_sum(x), blended)
    leaky = ablate.BinaryLIF(D=4, num_channels=1, beta=0.9)
    assert bool((leaky.encode_sum(x) <= binary.eval().encode_sum(x)).all())
