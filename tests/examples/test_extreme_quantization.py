"""examples/extreme_quantization from its command lines to what it leaves in output_dir."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

STUDENTS = ("float", "ternary", "binary")


def metrics_of(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def test_metrics_hold_what_is_promised(finished_extreme_quantization: Path) -> None:
    metrics = metrics_of(finished_extreme_quantization)
    assert metrics["held_out"]["sentences"] == 60
    accuracies = [metrics["teacher"]["accuracy"], *metrics["baselines"].values()]
    assert metrics["teacher"]["accuracy"] > metrics["baselines"]["majority"] + 0.1, "the teacher has learnt something"
    for name in STUDENTS:
        student = metrics["students"][name]
        accuracies += [student["rate_network_accuracy"], *(after["accuracy"] for after in student["after"].values())]
        assert student["after"]["16"]["accuracy"] > metrics["baselines"]["majority"] + 0.1, name
        assert set(student["after"]) == set(student["energy"]) == {"2", "16"}
        gaps = {T: sum(after["rate_gaps"].values()) for T, after in student["after"].items()}
        assert gaps["16"] < gaps["2"]
        energy = student["energy"]["16"]
        assert energy["estimate"] == "estimate, not measured on hardware"
        assert 0 < energy["benefit"] < student["energy"]["2"]["benefit"], "more steps cost more"
        assert energy["verdict"] == ("better" if energy["benefit"] > 1 else "worse") + " than dense"
        assert energy["T_times_rate"]["input_neuron"] == 16 * student["after"]["16"]["firing_rates"]["input_neuron"]
    assert all(0 < accuracy <= 1 for accuracy in accuracies)
    stages = metrics["training"]["ternary"]["stages"]
    assert set(stages) == {"internal", "prediction", "spiking"} and stages["spiking"]["rate_gap.layers.0"] > 0
    assert set(metrics["wall_s"]) == {"teacher", *STUDENTS}


def test_packed_bytes(finished_extreme_quantization: Path) -> None:
    """Matrices of 32 and 64 outputs, which leave blocks of 64 and 128 half full or less; docs/weights.md."""
    students = metrics_of(finished_extreme_quantization)["students"]
    assert "storage" not in students["float"]
    for name in ("ternary", "binary"):
        trained, packed = (students[name]["storage"][form] for form in ("trained", "packed"))
        assert packed["matrices"] < trained["matrices"] / 7
        saved = trained["matrices"] - packed["matrices"]
        assert trained["file"] - packed["file"] == pytest.approx(saved, abs=0.05 * saved)


def test_pictures(finished_extreme_quantization: Path) -> None:
    names = ["accuracy", *(f"{kind}-{name}" for kind in ("gap", "rates") for name in STUDENTS)]
    for name in names:
        picture = finished_extreme_quantization / "figures" / f"{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_students_work_in_a_pipeline(finished_extreme_quantization: Path) -> None:
    classify = pipeline("text-classification", model=str(finished_extreme_quantization / "ternary"))
    (answer,) = classify("a good film")
    assert answer["label"] in ("LABEL_0", "LABEL_1") and 0.5 <= answer["score"] <= 1


def test_a_finished_run_is_not_trained_again(extreme_quantization: Any, finished_extreme_quantization: Path) -> None:
    files = [finished_extreme_quantization / name / "model.safetensors" for name in ("teacher", *STUDENTS)]
    before = [path.stat().st_mtime_ns for path in files]
    assert extreme_quantization.run(finished_extreme_quantization, {}) == 0
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_teacher_of_ones_own_and_a_held_out_file(
    extreme_quantization: Any, finished_extreme_quantization: Path, small_text: Path, tmp_path: Path
) -> None:
    (tmp_path / "dev.jsonl").write_text('{"sentence": "good film", "label": 1}\n{"sentence": "bad film", "label": 0}\n')
    fields = {
        "teacher": finished_extreme_quantization / "teacher",
        "held_out_data": tmp_path / "dev.jsonl",
        "general_text": small_text,
        "float_stages.general.steps": 2,
        "weights": "[ternary]",
        "student.feedback": "true",
        "student.training_T": 2,
        "float_stages.prediction.steps": 2,
        "quantised_stages.prediction.steps": 2,
    }
    assert extreme_quantization.run(tmp_path / "run", fields) == 0
    metrics = metrics_of(tmp_path / "run")
    assert metrics["held_out"]["sentences"] == 2 and set(metrics["students"]) == {"ternary"}
    assert "general" in metrics["training"]["float"]["stages"]


def test_ablation(extreme_quantization: Any, finished_extreme_quantization: Path, tmp_path: Path) -> None:
    arguments = ["--preset", "ablation", f"run={finished_extreme_quantization}", f"output_dir={tmp_path}/ablation"]
    assert extreme_quantization.call("ablate.py", [*arguments, "tables=[ternary]", "T=[2,4]"]) == 0
    found = json.loads((tmp_path / "ablation" / "ablation.json").read_text())
    rows = found["1.58-bit students"]
    assert len(rows) == 9 and all(0 <= row["T = 4"] <= 1 for row in rows)
    rate = {row["row"]["name"]: row["mean rate"] for row in rows}
    assert rate["u(0) = 0, the paper's"] < rate["as the run"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"T": "[8,0]"}, "T must be one or more integers >= 1"),
        ({"student.training_T": 0}, "student.training_T must be at least 1, given 0"),
        ({"weights": "[ternary,ternary]"}, "weights must name each student once"),
        ({"temperature": 0}, "temperature must be finite and > 0, given 0"),
        ({"student.v_threshold": 0}, "v_threshold must be a finite number > 0"),
        ({"float_stages.internal.gradient_checkpointing": "true"}, "SpikingBert has no gradient checkpointing"),
        ({"held_out": 100000}, "count is 100000"),
        ({"teacher": "no/such/place"}, "teacher no/such/place cannot be loaded"),
        (
            {"float_stages.prediction.learning_rate": -1},
            "float_stages.prediction: learning_rate must be finite and > 0",
        ),
    ],
)
def test_bad_fields(
    extreme_quantization: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, Any], message: str
) -> None:
    assert extreme_quantization.run(tmp_path / "run", fields) not in (0, None)
    assert message in capsys.readouterr().err


def test_labels_beyond_the_teachers(
    extreme_quantization: Any, finished_extreme_quantization: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n" + "".join(f"film number {i}\t{i % 3}\n" for i in range(30)))
    fields = {"teacher": finished_extreme_quantization / "teacher", "data": tmp_path / "rows.tsv", "held_out": 5}
    assert extreme_quantization.run(tmp_path / "run", fields) not in (0, None)
    assert "has the label 2; 0 to 1 are accepted" in capsys.readouterr().err
    (tmp_path / "rows.tsv").write_text("sentence\tlabel\n")
    assert extreme_quantization.run(tmp_path / "run", fields) not in (0, None)
    assert "is empty" in capsys.readouterr().err
