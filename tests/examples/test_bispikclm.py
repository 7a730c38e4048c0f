"""examples/bispikclm from its command lines to what it leaves in output_dir."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from spikelm.models.bispikclm import BiSpikCLMForCausalLM

STEPS = 60


def metrics_of(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def test_metrics_hold_what_is_promised(finished_bispikclm: Path) -> None:
    metrics = metrics_of(finished_bispikclm)
    teacher, student, dense = metrics["teacher"], metrics["student"], metrics["dense"]
    assert teacher["kl_to_teacher"] == 0 < student["kl_to_teacher"]
    assert student["perplexity"] == pytest.approx(math.exp(student["ce"]))
    assert student["ce"] < math.log(300) - 0.3 and dense["ce"] < math.log(300) - 0.3, "both have learnt something"
    assert 0 < metrics["ngrams"]["bigram"] < metrics["ngrams"]["unigram"] < math.log(300)
    for name in ("student", "dense"):
        record = metrics["training"][name]
        assert record["steps"] == STEPS
        terms = ("embedding", "attention", "feature", "soft", "hard")
        weights = {term: metrics["config"]["alignment"][f"{term}_weight"] for term in terms}
        assert record["loss"] == pytest.approx(sum(w * record[term] for term, w in weights.items()), rel=1e-4)
    assert set(metrics["wall_s"]) >= {"student", "dense"} and metrics["versions"]["torch"]


def test_rates_of_every_population_and_densities_of_every_layer(finished_bispikclm: Path) -> None:
    firing = metrics_of(finished_bispikclm)["firing"]
    assert len(firing["sites"]) == 1 + 2 * 10 and len(firing["map_density"]) == 2
    for name, site in firing["sites"].items():
        assert len(site["rate_per_step"]) == 2 and 0 <= site["firing_rate"] <= 1, name
    assert 0.05 < firing["sites"]["model.input_neuron"]["firing_rate"] < 0.6
    assert firing["firing_rate"] == pytest.approx(sum(s["firing_rate"] for s in firing["sites"].values()) / 21)


def test_what_is_saved_is_the_student_alone(finished_bispikclm: Path) -> None:
    student, report = AutoModelForCausalLM.from_pretrained(finished_bispikclm / "student", output_loading_info=True)
    assert isinstance(student, BiSpikCLMForCausalLM) and student.config.T == 2
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for picture in ("firing.png", "raster.png", "losses.png"):
        assert (finished_bispikclm / "figures" / picture).read_bytes().startswith(b"\x89PNG")


def test_the_dense_model_has_the_students_shape(load_example: Callable[[str], ModuleType], bispikclm: Any) -> None:
    """It has the norms besides, which stand in front of attention and MLP, and OPT's two further positions."""
    from transformers import OPTForCausalLM

    from spikelm.models.bispikclm import BiSpikCLMConfig

    train = load_example("bispikclm/train.py")
    shape = BiSpikCLMConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    dense, student = OPTForCausalLM(train.dense_config(shape)), BiSpikCLMForCausalLM(shape)
    norms = 2 * 2 * 2 * 32 - 2 * 32  # two norms a layer; the student has one in front of its first neuron
    assert dense.num_parameters() == student.num_parameters() + norms + 2 * 32
    weights = [dense.model.decoder.layers[0].fc1.weight, student.model.layers[0].fc1.weight]
    assert weights[0].std().item() == pytest.approx(weights[1].std().item(), rel=0.1)


def test_a_finished_run_is_not_trained_again(bispikclm: Any, finished: Path, finished_bispikclm: Path) -> None:
    before = (finished_bispikclm / "student" / "model.safetensors").stat().st_mtime_ns
    assert bispikclm.run(finished_bispikclm, {"teacher": finished / "teacher"}) == 0
    assert (finished_bispikclm / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_teachers_without_maps_are_refused(
    bispikclm: Any, finished: Path, finished_spikingmamba: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = {"teacher": finished_spikingmamba / "teacher", "dense": "false"}
    assert bispikclm.run(tmp_path / "run", fields) == 2
    assert "teacher Mamba2ForCausalLM gives no attention maps" in (errors := capfd.readouterr().err)
    assert "eager" in errors and "attention_weight=0 leaves the term out" in errors


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("student.T=0", "T must be"),
        ("student.num_attention_heads=3", "hidden_size must be a multiple of num_attention_heads; got 32 and 3"),
        ("student.residual=float", "student.residual"),
        ("student.max_position_embeddings=16", "must be null or at least context_length 32, given 16"),
        ("alignment.gamma=2", "gamma must be"),
        ("alignment.soft_weight=-1", "soft_weight"),
        ("optimisation.steps=0", "optimisation: steps must be a whole number >= 1"),
        ("data=missing.txt", "no such text: missing.txt"),
    ],
)
def test_wrong_fields_are_refused_before_anything_is_trained(
    bispikclm: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], field: str, message: str
) -> None:
    name, _, value = field.partition("=")
    assert bispikclm.run(tmp_path / "run", {name: value}) == 2
    errors = capfd.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_preset_is_accepted(load_example: Callable[[str], ModuleType]) -> None:
    from spikelm.presets import load_config, preset_names

    train = load_example("bispikclm/train.py")
    names = preset_names(train.PRESETS)
    assert names == ["opt_125m", "smoke", "tiny"]
    for name in names:
        config = load_config(train.Config, name, [], train.PRESETS)
        train.check(config)
        assert config.student.T == 4 and config.optimisation.max_grad_norm == 0.7


def test_ablation_has_every_row(
    bispikclm: Any, finished_bispikclm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output_dir = tmp_path / "ablation"
    arguments = [f"run={finished_bispikclm}", f"output_dir={output_dir}", "seeds=[0]"]
    arguments += [
        "optimisation.steps=2",
        "optimisation.batch_size=4",
        "optimisation.bf16=false",
        "evaluation_contexts=4",
    ]
    assert bispikclm.call("ablate.py", arguments) == 0
    results = json.loads((output_dir / "ablation.json").read_text())
    rows = {row["row"]["name"]: row for row in results["SpAD's terms"]}
    assert list(rows) == [
        "all five",
        *(f"without {t}" for t in ("EA", "SAA", "SFA", "STA", "HTA")),
        "STA and HTA alone",
    ]
    assert [row["row"]["student"]["T"] for row in results["Time steps"]] == [2, 4]
    design = {row["row"]["name"]: row for row in results["Readings of the paper"]}
    for row in (*rows.values(), *design.values()):
        assert 0 < row["ce"] < 10 and 0 <= row["mean_map_density"] < 1 and len(row["map_density"]) == 2
    assert design["v_threshold 0.7"]["firing_rate"] > design["as the run"]["firing_rate"]
    assert design["as the run"]["ce"] == rows["all five"]["ce"], "a row of two tables is trained once"
    assert results["reference"]["ngrams"]["bigram"] > 0
    capfd.readouterr()
    assert bispikclm.call("ablate.py", [*arguments, "T=[0]"]) == 2
    assert "T must be" in capfd.readouterr().err


def test_train_mode_does_not_change_the_spikes(finished_bispikclm: Path) -> None:
    """No dropout, no statistics: what is trained is what is run."""
    student = AutoModelForCausalLM.from_pretrained(finished_bispikclm / "student")
    ids = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        packed = student(ids).logits
    assert torch.equal(student.train()(ids).logits, packed)


def test_thresholds_have_a_learning_rate_of_their_own(bispikclm: Any, finished: Path, tmp_path: Path) -> None:
    fields = {"teacher": finished / "teacher", "dense": "false", "student.learn_threshold": "true"}
    fields |= {"optimisation.steps": 4, "optimisation.learning_rate": 1e-9}
    assert bispikclm.run(tmp_path / "run", fields | {"optimisation.threshold_learning_rate": 0.1}) == 0
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student")
    assert student.model.layers[0].fc1_neuron.a.abs().max() > 0.01


MEMORY = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM
from spikelm.distill import SpAD
from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM
torch.manual_seed(0)
OPTForCausalLM(OPTConfig()).save_pretrained(sys.argv[1])
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval().requires_grad_(False)
assert 125e6 < teacher.num_parameters() < 126e6
student = BiSpikCLMForCausalLM(BiSpikCLMConfig.opt("125m", T=2)).train()
objective = SpAD(T=2, project=True)
student.distillation_projections = objective.build_projections(student, teacher)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
batch = {"input_ids": torch.randint(3, 50000, (1, 32))}
losses = []
for _ in range(2):
    loss = objective(student, teacher, batch)["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_a_teacher_of_opt_125ms_shape_fits_into_8_gigabytes(tmp_path: Path, repository: Path) -> None:
    """Written by transformers with random weights; two steps of a student of its shape: AdamW then has state."""
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "opt-125m")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = float(done.stdout.splitlines()[-1])
    print(f"peak memory {peak / 1e9:.2f} GB")
    assert peak < 8e9
