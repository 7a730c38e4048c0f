"""examples/mar/train.py and ablate.py from their command line to what they leave in output_dir."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

STAGES = ("orientation", "alignment", "stage1", "student")
SITES = ("mixer.in_proj", "mixer.out_proj", "mlp.gate_proj", "mlp.down_proj")


def files(directory: Path) -> dict[str, tuple[int, str]]:
    """Relative name -> time of writing and digest of every file."""
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def metrics_of(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def test_metrics_hold_what_is_promised(finished: Path) -> None:
    metrics = metrics_of(finished)
    for model in ("teacher", "stage1", "student"):
        figures = metrics[model]
        assert figures["ce"] > 0 and figures["bits_per_byte"] > 0
        assert figures["kl_to_teacher"] >= 0 and figures["reverse_kl"] >= 0
        assert figures["sample"].startswith("The cat") and len(figures["sample"]) > len("The cat")
    assert metrics["teacher"]["kl_to_teacher"] == metrics["teacher"]["reverse_kl"] == 0
    assert 0 < metrics["stage1"]["kl_to_teacher"] and 0 < metrics["student"]["kl_to_teacher"]
    assert metrics["teacher"]["ce"] < math.log(300), "the embedded teacher has learnt something"
    # a bit per byte is a nat per token over the same text, for all three models
    ratios = {round(metrics[m]["ce"] / metrics[m]["bits_per_byte"], 6) for m in ("teacher", "stage1", "student")}
    assert len(ratios) == 1
    assert set(metrics["training"]) == set(STAGES) and set(metrics["wall_s"]) == {"teacher", *STAGES}
    assert all(seconds > 0 for seconds in metrics["wall_s"].values())
    assert metrics["config"]["distillation"]["steps"] == 60 and metrics["config"]["seed"] == 0
    assert {"torch", "transformers", "spikingjelly", "spikelm", "python", "machine"} <= set(metrics["versions"])
    assert metrics["training"]["stage1"]["steps"] == 60
    converted, trained = metrics["training"]["student"]["at_conversion"], metrics["student"]
    assert trained["kl_to_teacher"] < converted["kl_to_teacher"], "stage 2 makes the converted student better"


def test_firing_is_given_per_site(finished: Path) -> None:
    firing = metrics_of(finished)["firing"]
    assert set(firing["sites"]) == {f"backbone.layers.{layer}.{site}" for layer in (0, 1) for site in SITES}
    for rates in firing["sites"].values():
        assert len(rates["rate_per_step"]) == 4
        assert rates["sum_of_rates"] == pytest.approx(sum(rates["rate_per_step"]))
        assert 0 < rates["union_rate"] <= min(1, rates["sum_of_rates"])
    mean = sum(rates["sum_of_rates"] for rates in firing["sites"].values()) / 8
    assert firing["sum_of_rates"] == pytest.approx(mean)


def test_checkpoints_and_figures_are_there_and_whole(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / stage / "manifest.json").read_text())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(manifest["files"])
        for name, of in manifest["files"].items():
            content = (finished / stage / name).read_bytes()
            assert of == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for figure in ("losses", "firing", "raster"):
        assert (finished / "figures" / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("*.partial"))


def test_a_second_call_trains_nothing_and_prints_the_table_again(
    mar: Any, finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, metrics = files(finished), metrics_of(finished)
    capfd.readouterr()
    assert mar.run(finished, {}) == 0
    output = capfd.readouterr()
    assert "training" not in output.err
    table = [line.split() for line in output.out.splitlines() if line.startswith(("teacher", "stage1", "student"))]
    for name, *values in table:
        columns = ("ce", "bits_per_byte", "kl_to_teacher", "reverse_kl")
        assert [float(value) for value in values] == [round(metrics[name][column], 4) for column in columns]
    assert [name for name, *_ in table] == ["teacher", "stage1", "student"]
    rewritten = {"metrics.json", "run.lock"}
    kept = {name: state for name, state in before.items() if name not in rewritten and "figures/" not in name}
    assert len(kept) > 30
    assert {name: state for name, state in files(finished).items() if name in kept} == kept
    assert metrics_of(finished) == metrics, "the models that were saved are the models that were measured"


def test_stages_one_at_a_time_give_the_same_student(
    mar: Any, finished: Path, same_teacher: dict[str, Any], tmp_path: Path, weights: Callable[..., Any]
) -> None:
    for number, stage in enumerate(STAGES, start=1):
        assert mar.run(tmp_path / "run", same_teacher | {"stages": f"[{stage}]"}) == 0
        assert [name for name in STAGES if (tmp_path / "run" / name).exists()] == list(STAGES[:number])
    for stage in STAGES:
        expected, found = weights(finished / stage), weights(tmp_path / "run" / stage)
        assert expected.keys() == found.keys()
        assert all(torch.equal(value, found[name]) for name, value in expected.items()), stage


LOAD_AND_GENERATE = """
import sys, spikelm
from spikelm.convert import spike_sites
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert len(spike_sites(model)) == 8
ids = tokenizer("<s>The cat", add_special_tokens=False, return_tensors="pt")
tokens = model.generate(**ids, max_new_tokens=8, do_sample=False)[0]
print(tokenizer.decode(tokens, skip_special_tokens=True))
print(model.generate(**ids, max_new_tokens=24, do_sample=False, no_repeat_ngram_size=1)[0].tolist())
"""


def test_the_student_loads_in_a_new_process_and_says_the_same(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = subprocess.run(
        [sys.executable, "-c", LOAD_AND_GENERATE, str(finished / "student")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    *text, tokens = result.stdout.removesuffix("\n").split("\n")
    assert "\n".join(text) == metrics_of(finished)["student"]["sample"], "what the model said before it was saved"

    model = AutoModelForCausalLM.from_pretrained(finished / "student").eval()
    ids = AutoTokenizer.from_pretrained(finished / "student")("<s>The cat", return_tensors="pt")["input_ids"]
    for _ in range(24):  # without a cache; a model trained for seconds would repeat itself
        logits = model(ids).logits[0, -1].index_fill(0, ids[0], -math.inf)
        ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    assert ids[0].tolist() == json.loads(tokens)


def test_a_given_stage1_leads_to_the_same_student(
    mar: Any, finished: Path, same_teacher: dict[str, Any], tmp_path: Path, weights: Callable[..., Any]
) -> None:
    assert mar.run(tmp_path / "run", same_teacher | {"stage1": finished / "stage1"}) == 0
    assert not (tmp_path / "run" / "stage1").exists()
    expected, found = weights(finished / "student"), weights(tmp_path / "run" / "student")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    before, after = metrics_of(finished), metrics_of(tmp_path / "run")
    assert after["stage1"] == before["stage1"] and after["student"] == before["student"]


@pytest.fixture(scope="module")
def from_stage1(finished: Path) -> dict[str, Any]:
    """Fields of a run that trains but a student, from the finished run's stage 1 and with its Llama as the teacher."""
    return {
        "teacher": finished / "teacher",
        "stage1": finished / "stage1",
        "spiking.teacher": "llama",
        "spiking.optimisation.steps": 6,
        "spiking.optimisation.learning_rate": 0.001,
    }


def test_spad_trains_the_student_and_leaves_no_projection_in_it(
    mar: Any, from_stage1: dict[str, Any], finished: Path, tmp_path: Path, weights: Callable[..., Any]
) -> None:
    from spikelm.distill.callbacks import read_metrics

    output_dir = tmp_path / "run"
    assert mar.run(output_dir, from_stage1 | {"objective": "spad", "spad.v_threshold": 0.7}) == 0
    (line,) = read_metrics(output_dir / "training" / "student" / "log.jsonl")
    parts = {"embedding": 0.2, "attention": 0.1, "feature": 0.1, "soft": 0.3, "hard": 0.3}
    assert line["loss"] == pytest.approx(sum(weight * line[name] for name, weight in parts.items()), rel=1e-4)
    assert min(line[name] for name in ("attention", "feature", "soft", "hard")) > 0
    assert weights(output_dir / "student").keys() == weights(finished / "student").keys()
    metrics = metrics_of(output_dir)
    assert metrics["config"]["objective"] == "spad" and metrics["config"]["spad"]["v_threshold"] == 0.7
    assert metrics["student"]["ce"] < metrics["training"]["student"]["at_conversion"]["ce"]


def test_kl_is_the_forward_divergence_alone(
    mar: Any, from_stage1: dict[str, Any], tmp_path: Path, weights: Callable[..., Any]
) -> None:
    forward = {"spiking.alpha": 1.0, "spiking.beta": 0.0, "spiking.feature_weight": 0.0}
    unread = {"spiking.alpha": 0.1, "spiking.beta": 0.9, "spiking.feature_weight": 2.0}
    assert mar.run(tmp_path / "sbds", from_stage1 | forward) == 0
    assert mar.run(tmp_path / "kl", from_stage1 | unread | {"objective": "kl"}) == 0
    expected, found = weights(tmp_path / "sbds" / "student"), weights(tmp_path / "kl" / "student")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_ternary_student_beside_its_packed_size(
    mar: Any, from_stage1: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    from spikelm.convert import recipe_of, spike_sites

    output_dir = tmp_path / "run"
    assert mar.run(output_dir, from_stage1 | {"spiking.weights": "ternary", "spiking.per_row": "true"}) == 0
    metrics = metrics_of(output_dir)
    assert metrics["student"]["ce"] < metrics["training"]["student"]["at_conversion"]["ce"]
    student = AutoModelForCausalLM.from_pretrained(output_dir / "student")
    assert (recipe_of(student).weights, recipe_of(student).per_row) == ("ternary", True)
    assert all(site.weights == "ternary" for site in spike_sites(student).values())
    trained, packed = metrics["storage"]["trained"], metrics["storage"]["packed"]
    assert trained["file"] == (output_dir / "student" / "model.safetensors").stat().st_size
    assert packed["matrices"] < 0.25 * trained["matrices"]  # rows of 32 to 164 outputs in blocks of 64, and scales
    assert packed["file"] < trained["file"]
    assert f"matrices {trained['matrices']:,} -> {packed['matrices']:,}" in capfd.readouterr().out


def test_a_student_below_a_rate(
    mar: Any, from_stage1: dict[str, Any], finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from spikelm.distill.callbacks import read_metrics

    wanted = {"spiking.sparsity.target": 0.3, "spiking.sparsity.weight": 1.5, "spiking.sparsity.max_sum_of_rates": 0.4}
    assert mar.run(tmp_path / "run", from_stage1 | wanted) == 0
    (line,) = read_metrics(tmp_path / "run" / "training" / "student" / "log.jsonl")
    assert line["loss"] == pytest.approx(line["objective"] + 1.5 * line["activity"], rel=1e-4)
    assert line["activity"] == pytest.approx(max(0.0, line["rate"] - 0.3), abs=0.02)  # the mean over steps of a hinge
    sums = [metrics_of(run)["firing"]["sum_of_rates"] for run in (tmp_path / "run", finished)]
    assert sums[0] < 0.6 * sums[1]
    for name, message in (("target", "target must be a rate > 0 and <= 1"), ("max_sum_of_rates", "max_sum_of_rates")):
        assert mar.run(tmp_path / "none", from_stage1 | wanted | {f"spiking.sparsity.{name}": -1}) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_float_student_says_nothing_of_packing(finished: Path) -> None:
    assert "storage" not in metrics_of(finished)


def test_spad_wants_a_teacher_with_attention(
    mar: Any, from_stage1: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fields = from_stage1 | {"objective": "spad", "spiking.teacher": "stage1"}
    assert mar.run(tmp_path / "run", fields) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: objective=spad compares attention maps") and "spiking.teacher=llama" in errors
    assert mar.run(tmp_path / "run", fields | {"spad.gamma": 2}) == 2
    assert "gamma must be in [0, 1], given 2" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_without_its_earlier_stage_is_refused(
    mar: Any, same_teacher: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mar.run(tmp_path / "run", same_teacher | {"stages": "[student]"}) == 2
    assert "error: the student needs stage1" in capfd.readouterr().err


def test_every_preset_is_accepted(load_example: Callable[[str], ModuleType]) -> None:
    from spikelm.presets import load_config, preset_names

    train = load_example("mar/train.py")
    names = preset_names(train.PRESETS)
    assert names == ["demo", "llamba_1b", "llamba_1b_8gpu", "smoke", "tiny"]
    for name in names:
        config = load_config(train.Config, name, [], train.PRESETS)
        train.check(config)
        assert config.output_dir == f"runs/{name}"
        assert config.stages == list(STAGES)
        assert min(getattr(config, stage).steps for stage in ("orientation", "alignment", "distillation")) > 0


def test_the_paper_preset_holds_what_the_paper_prints(load_example: Callable[[str], ModuleType]) -> None:
    from spikelm.presets import load_config

    train = load_example("mar/train.py")
    config = load_config(train.Config, "llamba_1b", [], train.PRESETS)
    spiking = config.spiking
    assert (spiking.alpha, spiking.beta, spiking.taps, spiking.teacher) == (0.2, 0.7, "pre", "stage1")
    assert spiking.feature_weight > 0
    assert config.context_length == 2048
    assert (spiking.neuron.name, spiking.neuron.tau, spiking.neuron.frame_weight) == ("ATMN", 1.0, 1.0)
    assert all(source in config.data for source in ("GenQA", "OpenHermes-2.5", "Infinity-Instruct"))
    assert config.streaming


@pytest.fixture(scope="module")
def ablation(mar: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished ablation of one step a row, and its command line."""
    output_dir = tmp_path_factory.mktemp("ablation") / "out"
    fields = {"seeds": "[0]", "T": "[1, 2]", "optimisation.steps": 1, "optimisation.batch_size": 4}
    arguments = [f"run={finished}", f"output_dir={output_dir}", *(f"{name}={value}" for name, value in fields.items())]
    assert mar.call("ablate.py", arguments) == 0
    return output_dir, arguments


def test_ablation_has_every_row(ablation: tuple[Path, list[str]]) -> None:
    output_dir, _ = ablation
    codes = ("tau 1, counts", "tau 0.5, weights 2^-t", "tau 2, counts")
    expected = {
        "Table 2, components": ["binary, KL", "ATMN, KL", "ATMN, KL + reverse KL", "ATMN, KL + reverse KL, pre-norm"],
        "Table 3, where features are compared": ["pre", "post", "both"],
        "Table 4, (alpha, beta)": ["(0.0, 1.0)", "(1.0, 0.0)", "(0.7, 0.2)", "(0.2, 0.7)"],
        "T and tau, forward KL": [f"T = {T}, {code}" for code in codes for T in (1, 2)],
    }
    tables: dict[str, list[str]] = {}
    for line in (output_dir / "table.md").read_text().splitlines():
        if line.startswith("### "):
            tables[line[4:]] = []
        elif line.startswith("| ") and not line.startswith("| row |"):
            name, *values = (cell.strip() for cell in line.strip("|").split("|"))
            assert len(values) == 6 and all(math.isfinite(float(value)) for value in values)
            list(tables.values())[-1].append(name)
    assert tables == expected

    results = json.loads((output_dir / "ablation.json").read_text())
    assert results["config"]["T"] == [1, 2] and results["versions"]["torch"]
    assert results["reference"]["stage1"]["ce"] > 0
    rows = {title: {row["row"]["name"]: row for row in results[title]} for title in expected}
    assert {title: list(named) for title, named in rows.items()} == expected
    columns = ("ce", "kl_to_teacher", "reverse_kl", "kl_to_stage1", "sum_of_rates", "union_rate")
    same = rows["Table 2, components"]["ATMN, KL"], rows["Table 4, (alpha, beta)"]["(1.0, 0.0)"]
    assert [same[0][column] for column in columns] == [same[1][column] for column in columns]
    # after one step it is the code that decides: ternary beats binary, T = 2 beats T = 1
    assert same[0]["kl_to_stage1"] < rows["Table 2, components"]["binary, KL"]["kl_to_stage1"]
    grid = rows["T and tau, forward KL"]
    for code in codes:
        assert grid[f"T = 2, {code}"]["kl_to_stage1"] < grid[f"T = 1, {code}"]["kl_to_stage1"]
    assert (output_dir / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_ablation_rows_are_not_trained_again(mar: Any, ablation: tuple[Path, list[str]]) -> None:
    output_dir, arguments = ablation
    rows = {name: state for name, state in files(output_dir).items() if name.startswith("row-")}
    table = (output_dir / "table.md").read_text()
    assert len(rows) == 4 + 2 + 2 + 6  # rows that two tables share are trained once
    assert mar.call("ablate.py", arguments) == 0
    assert {name: state for name, state in files(output_dir).items() if name.startswith("row-")} == rows
    assert (output_dir / "table.md").read_text() == table

    one = output_dir / sorted(rows)[0]
    before = json.loads(one.read_text())
    one.unlink()  # as if interrupted before it: this row alone is made again, and comes out the same
    assert mar.call("ablate.py", arguments) == 0
    assert json.loads(one.read_text()) == before
    again = {name: state for name, state in files(output_dir).items() if name.startswith("row-")}
    assert [name for name in rows if again[name][0] != rows[name][0]] == [one.name]


def test_objectives_are_compared_under_the_llama(mar: Any, finished: Path, tmp_path: Path) -> None:
    fields = {"tables": "[objective]", "seeds": "[0, 1]", "optimisation.steps": 1, "optimisation.batch_size": 4}
    arguments = [f"run={finished}", f"output_dir={tmp_path}", *(f"{name}={value}" for name, value in fields.items())]
    assert mar.call("ablate.py", arguments) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["Objectives, the Llama as frozen teacher"]
    assert [(row["row"]["name"], row["row"]["seed"]) for row in rows] == [
        (name, seed) for name in ("SBDS", "SpAD", "KL") for seed in (0, 1)
    ]
    assert {row["row"]["teacher"] for row in rows} == {"llama"}
    assert len({row["ce"] for row in rows}) == 6  # each objective and seed makes another student
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[4:7]] == ["| SBDS", "| SpAD", "| KL"]
    assert all(line.count("+-") == 6 for line in lines[4:7])


def test_forms_of_weights_are_compared(mar: Any, finished: Path, tmp_path: Path) -> None:
    fields = {"tables": "[weights]", "seeds": "[0]", "optimisation.steps": 1, "optimisation.batch_size": 4}
    arguments = [f"run={finished}", f"output_dir={tmp_path}", *(f"{name}={value}" for name, value in fields.items())]
    assert mar.call("ablate.py", arguments) == 0
    rows = json.loads((tmp_path / "ablation.json").read_text())["Weights of the projections, forward KL"]
    assert [row["row"]["name"] for row in rows] == ["float", "ternary", "ternary per row", "binary"]
    assert [row["row"]["weights"] for row in rows] == ["float", "ternary", "ternary", "binary"]
    assert len({row["ce"] for row in rows}) == 4
    assert min(row["kl_to_stage1"] for row in rows) == rows[0]["kl_to_stage1"]


@pytest.fixture(scope="module")
def pareto(mar: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished pareto.py of a few steps a row, and its command line."""
    output_dir = tmp_path_factory.mktemp("pareto") / "out"
    fields = {"optimisation.steps": 4, "optimisation.batch_size": 4, "evaluation_contexts": 4}
    arguments = [f"run={finished}", f"output_dir={output_dir}", *(f"{name}={value}" for name, value in fields.items())]
    arguments = ["--preset", "smoke", *arguments]
    assert mar.call("pareto.py", arguments) == 0
    return output_dir, arguments


def test_pareto_trades_quality_for_rate(pareto: tuple[Path, list[str]]) -> None:
    from transformers import AutoModelForCausalLM

    from spikelm.convert import recipe_of

    output_dir, _ = pareto
    results = json.loads((output_dir / "ablation.json").read_text())
    rows = results["Quality against rate"]
    assert [(row["row"]["T"], row["row"]["target"]) for row in rows] == [(4, None), (4, 0.3), (2, None), (2, 0.3)]
    for free, held in (rows[:2], rows[2:]):
        assert held["read_rate"] < 0.8 * free["read_rate"] and held["sum_of_rates"] < free["sum_of_rates"]
        assert held["ce"] > free["ce"]
    for row in rows:
        assert min(row["union_by_site"].values()) <= row["read_rate"] <= max(row["union_by_site"].values())
    students = [AutoModelForCausalLM.from_pretrained(path) for path in sorted((output_dir / "students").iterdir())]
    assert sorted(recipe_of(student).neuron_arguments["T"] for student in students) == [2, 2, 4, 4]
    assert (output_dir / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens_per_second" not in (output_dir / "table.md").read_text()


def test_pareto_times_the_students_that_are_there(
    mar: Any, pareto: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import spikelm
    from spikelm import evaluate_decoding

    output_dir, arguments = pareto
    before = {name: state for name, state in files(output_dir).items() if name.startswith(("row-", "students/"))}
    timed: list[tuple[bool, int]] = []

    def tokens_per_second(model: Any, prompt_ids: torch.Tensor, new_tokens: int) -> float:
        timed.append((getattr(model, "_spiking_recipe", None) is not None, new_tokens))
        return 99.0 + len(timed)

    forms: list[str] = []
    monkeypatch.setattr(evaluate_decoding, "tokens_per_second", tokens_per_second)
    monkeypatch.setattr(spikelm, "deploy", lambda model, form: forms.append(form) or model)
    assert mar.call("pareto.py", [*arguments, "stages=[measure]", "new_tokens=16"]) == 0
    assert timed == [(False, 16), *[(True, 16)] * 4] and forms == ["gather"] * 4
    results = json.loads((output_dir / "ablation.json").read_text())
    assert results["reference"]["stage1"]["tokens_per_second"] == 100
    assert [row["tokens_per_second"] for row in results["Quality against rate"]] == [101, 102, 103, 104]
    assert "| tokens_per_second |" in (output_dir / "table.md").read_text()
    after = files(output_dir)
    assert {name: after[name] for name in before} == before


def test_ablation_of_something_that_is_no_run_is_one_line(
    mar: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert mar.call("ablate.py", [f"run={tmp_path}", f"output_dir={tmp_path / 'out'}"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("error: run must be the output_dir of a finished train.py") and errors.count("\n") == 1


def test_thirty_steps_bring_the_student_towards_a_real_teacher(
    mar: Any, teacher_path: Path, tinystories_path: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from spikelm.data import load_contexts, load_teacher
    from spikelm.evaluate import evaluate
    from spikelm.models.llamba import LlambaForCausalLM

    fields = {
        "teacher": teacher_path,
        "data": tinystories_path,
        "stages": "[alignment, stage1]",
        "context_length": 128,
        "orientation.steps": 0,
        "alignment.steps": 30,
        "alignment.batch_size": 8,
        "distillation.steps": 30,
        "distillation.batch_size": 8,
        "evaluation_contexts": 16,
        "prompt": "Once upon a time",
    }
    assert mar.run(tmp_path / "run", fields) == 0
    metrics = metrics_of(tmp_path / "run")
    teacher, tokenizer = load_teacher(teacher_path)
    _, held_out = load_contexts(tinystories_path, tokenizer, 128)

    def kl(model: Any) -> float:
        return float(evaluate(model, held_out, teacher=teacher, max_contexts=16)["kl_to_teacher"])

    converted = kl(LlambaForCausalLM.from_llama(teacher, chunk_size=32, d_conv=4))
    aligned = kl(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "alignment"))
    print(f"KL to the teacher: converted {converted:.3f}, aligned {aligned:.3f}, {metrics['stage1']['kl_to_teacher']}")
    assert metrics["teacher"]["ce"] == pytest.approx(1.83, abs=0.15)
    assert aligned < 0.8 * converted
    assert metrics["stage1"]["kl_to_teacher"] < 0.8 * aligned
