"""All four systems in one table: quality, rates, estimated energy, speed, bytes and training time, beside their rivals.

    python benchmarks/systems.py teacher=PATH data=stories.txt sst2=train.tsv+dev.tsv blimp=FILE.jsonl,FILE.jsonl \\
        --runs runs/systems --output benchmarks/results/systems.json

Students that --runs does not hold yet are trained there first by the scripts in examples/, preset tiny (an hour on one
core); the same command goes on after an interruption. Dense students and quantised ones (activations rounded at the
same places, calibrated, not trained) are measured like the spiking ones. Run it on a quiet machine: it measures speed.
`python benchmarks/tables.py` then writes the table into the pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import spikelm
from spikelm import Recipe
from spikelm.compare import Measures, open_model, read_contexts, score_model
from spikelm.convert import spike_sites
from spikelm.data.classification import encode_rows, hold_out_sentences, load_classification
from spikelm.energy import report
from spikelm.errors import SpikelmError
from spikelm.evaluate import batches, firing_statistics, population_statistics
from spikelm.evaluate_decoding import decoding_speed
from spikelm.files import write_json
from spikelm.models.bispikclm import BiSpikCLMForCausalLM
from spikelm.run import command_line, versions

ROOT = Path(__file__).resolve().parents[1]
CONTEXT_LENGTH, HELD_OUT, CALIBRATION = 128, 0.05, 64  # as in the presets
COUNTED, PROMPT, NEW = 4, 16, 64  # contexts for the energy; tokens of the decoding that is timed
BERT_STEPS, BERT_SENTENCES = 16, 32
HELD_OUT_SENTENCES = 1821


@dataclass(frozen=True)
class Inputs:
    """What the command line names."""

    teacher: str
    data: str
    sst2: str
    blimp: Sequence[str]
    runs: Path


def training_commands(inputs: Inputs) -> dict[str, list[str]]:
    """Run -> script and its fields, in an order in which each finds what it starts from."""
    text, runs = f"data={inputs.data}", inputs.runs
    llama = [f"teacher={inputs.teacher}", text]
    return {
        "mar": ["mar", *llama],
        "spikingmamba": ["spikingmamba", f"teacher={runs / 'mar' / 'stage1'}", text],
        "bispikclm": ["bispikclm", *llama],
        "sst2": ["extreme_quantization", f"data={inputs.sst2}", f"held_out={HELD_OUT_SENTENCES}"],
    }


def train_missing(inputs: Inputs) -> dict[str, dict[str, Any]]:
    """Trains what is not there yet; the metrics of every run."""
    found = {}
    for name, (example, *fields) in training_commands(inputs).items():
        directory = inputs.runs / name
        if not (directory / "metrics.json").exists():
            script = ROOT / "examples" / example / "train.py"
            fields = [*fields, f"output_dir={directory}"]
            subprocess.run([sys.executable, str(script), "--preset", "tiny", *fields], check=True, stdout=sys.stderr)
        found[name] = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    return found


# ---- language models


@torch.no_grad()
def language_model(
    model: Any,
    tokenizer: Any,
    inputs: Inputs,
    teacher: Any,
    deployed: Callable[[Any], Any] | None = None,
    counted: Any = None,
) -> dict[str, Any]:
    """CE, bits per byte, KL to the teacher, BLiMP, rates, energy, and the speed of its form for decoding.

    counted: the form of the model whose energy is estimated; None is the model as it is.
    """
    measures = Measures(
        data=inputs.data, context_length=CONTEXT_LENGTH, held_out=HELD_OUT, tasks=inputs.blimp, batch_size=16
    )
    figures = score_model(model, tokenizer, measures, teacher)
    rows = read_contexts(measures, tokenizer)
    ids = next(batches(rows, COUNTED))
    tasks = {name: found["metrics"]["acc"] for name, found in figures["tasks"]["tasks"].items()}
    row = {"text": figures["text"], "blimp": tasks, "parameters": figures["parameters"], "rates": rates(model, rows)}
    row["energy"] = energy(model if counted is None else counted, ids[:, : CONTEXT_LENGTH // 2])
    fast = model if deployed is None else deployed(model)  # in place
    return row | {"speed": decoding_speed(fast, ids[:1, :PROMPT], NEW)}


def rates(model: Any, rows: Any) -> dict[str, float] | None:
    """Sum of rates and union of a student's projections, or the rate of a BiSpikCLM's populations."""
    if isinstance(model, BiSpikCLMForCausalLM):
        return {"firing_rate": population_statistics(model, rows)["firing_rate"]}
    if not spike_sites(model):
        return None
    found = firing_statistics(model, rows)
    return {name: found[name] for name in ("sum_of_rates", "union_rate")}


def energy(model: Any, ids: torch.Tensor | list[torch.Tensor]) -> dict[str, Any]:
    """Estimate per token, one sequence at a time: of decoding where the model decodes."""
    batches = [{"input_ids": row.view(1, -1)} for row in ids]
    data = report(model, batches, max_batches=len(batches)).data
    name = "decode" if "decode" in data["phases"] else data["of"]
    kept = {
        who: {key: found[key] for key in ("arithmetic_pj", "total_pj")}
        for who, found in data["phases"][name]["energy"].items()
    }
    return {"estimate": data["estimate"], "costs": data["costs"]["name"], "phase": name, "energy": kept}


def quantised(stage1: Any, data: Any, preset: str, bits: int) -> Any:
    """The dense student with activations of so many bits and int8 weights where a student has its neurons.

    A bank of TILIF with 2^(bits - 1) - 1 levels a side and a threshold that training would not move is a symmetric
    uniform quantiser; calibrate chooses its step per channel, as for the students.
    """
    recipe = Recipe.preset(preset, neuron="TILIF", weights="int8", D=2 ** (bits - 1) - 1)
    spikelm.spikify(stage1, recipe)
    inputs = ({"input_ids": ids, "logits_to_keep": 1} for ids in batches(data, 4, CALIBRATION))
    spikelm.calibrate(stage1, inputs, tokens_per_site=CALIBRATION * CONTEXT_LENGTH)
    return stage1


def checkpoint_bytes(directory: Path) -> int:
    """Of the weights as they are saved."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def saved_bytes(model: Any) -> int:
    """Of a model's weights, saved."""
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return checkpoint_bytes(Path(directory))


def language_models(inputs: Inputs, runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for every language model."""
    teacher, _ = open_model(inputs.teacher, role="teacher")
    seconds = {name: found["wall_s"] for name, found in runs.items()}
    stage1_s = sum(seconds["mar"][name] for name in ("orientation", "alignment", "stage1"))
    stage1 = inputs.runs / "mar" / "stage1"
    models: list[tuple[str, Path, float | None, Callable[[Any], Any] | None]] = [
        ("teacher: Llama", Path(inputs.teacher), None, None),
        ("Llamba (Mamba-2), dense", stage1, stage1_s, None),
        ("MAR", inputs.runs / "mar" / "student", stage1_s + seconds["mar"]["student"], spikelm.deploy),
        (
            "SpikingMamba",
            inputs.runs / "spikingmamba" / "student",
            stage1_s + seconds["spikingmamba"]["student"],
            spikelm.deploy,
        ),
        ("BiSpikCLM", inputs.runs / "bispikclm" / "student", seconds["bispikclm"]["student"], None),
        ("OPT of BiSpikCLM's shape, dense", inputs.runs / "bispikclm" / "dense", seconds["bispikclm"]["dense"], None),
    ]
    rows = []
    for name, directory, trained, deployed in tqdm(models, desc="language models"):
        model, tokenizer = open_model(str(directory))
        row = {"name": name, "training_s": trained, "checkpoint_bytes": checkpoint_bytes(directory)}
        rows.append(row | language_model(model, tokenizer, inputs, teacher, deployed))
    for preset, bits, of in (("mar", 5, "MAR"), ("spikingmamba", 4, "SpikingMamba")):
        packed, tokenizer = open_model(str(stage1))
        text = read_contexts(Measures(data=inputs.data, context_length=CONTEXT_LENGTH), tokenizer)
        packed = spikelm.deploy(quantised(packed, text, preset, bits), form="packed")
        model = quantised(open_model(str(stage1))[0], text, preset, bits)
        row = {"name": f"Llamba, {bits}-bit activations and int8 weights at the places of {of}", "training_s": stage1_s}
        row |= {"checkpoint_bytes": saved_bytes(packed)}
        row |= language_model(model, tokenizer, inputs, teacher, spikelm.deploy, packed)
        # A quantised model multiplies by all of its activations, zeros too.
        row["energy"]["energy"] = {"model": row["energy"]["energy"]["quantised_student"]}
        rows.append(row | {"rates": None})
    return rows


# ---- classifiers


@torch.no_grad()
def classifiers(inputs: Inputs, run: dict[str, Any]) -> list[dict[str, Any]]:
    """SpikingBert on held-out sentences of SST-2 beside its teacher; accuracies are those of its run."""
    directory, seconds = inputs.runs / "sst2", run["wall_s"]
    config = run["config"]
    _, held_out = hold_out_sentences(load_classification(inputs.sst2), config["held_out"], config["held_out_seed"])
    sentences = held_out[:BERT_SENTENCES]
    teacher_s, float_s = seconds["teacher"], seconds["float"]
    totals = {"teacher": teacher_s, "float": teacher_s + float_s}
    totals |= {name: totals["float"] + seconds[name] for name in ("ternary", "binary")}
    titles = {"teacher": "teacher: BERT", "float": "SpikingBert", "ternary": "SpikingBert, 1.58 bit"}
    titles["binary"] = "SpikingBert, 1 bit"
    rows = []
    for name, title in tqdm(titles.items(), desc="classifiers"):
        model: Any = AutoModelForSequenceClassification.from_pretrained(directory / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory / name)
        student = run["students"].get(name)
        if student is not None:
            model.config.T = BERT_STEPS
        encoded = [torch.tensor([row["input_ids"]]) for row in encode_rows(sentences, tokenizer, 64)]
        row: dict[str, Any] = {"name": title, "training_s": totals[name]}
        row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        row["checkpoint_bytes"] = checkpoint_bytes(directory / name)
        row["accuracy"] = run["teacher"]["accuracy"]
        if student is not None:
            after = student["after"][str(BERT_STEPS)]
            populations = after["firing_rates"].values()
            row["accuracy"] = after["accuracy"]
            row["rates"] = {"firing_rate": sum(populations) / len(populations)}
            row["checkpoint_bytes"] = student.get("storage", {}).get("packed", {}).get("file", row["checkpoint_bytes"])
        row["energy"] = energy(model, encoded[:COUNTED])
        rows.append(row | {"speed": {"tokens_per_second": reading_speed(model, encoded)}})
    return rows


def reading_speed(model: Any, sentences: list[torch.Tensor]) -> float:
    """Tokens per second of one sentence [1, L] at a time, the median of several passes over all of them."""
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        for ids in sentences:
            model(ids)
        seconds.append(time.perf_counter() - start)
    return sum(ids.numel() for ids in sentences) / statistics.median(seconds[1:])


def main() -> None:
    """Train what is missing, measure everything, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fields", nargs="+", help="teacher=PATH data=FILE sst2=FILES blimp=FILES")
    parser.add_argument("--runs", type=Path, default=Path("runs/systems"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    fields = dict(field.partition("=")[::2] for field in options.fields)
    wanted = {"teacher", "data", "sst2", "blimp"}
    if set(fields) != wanted or not all(fields.values()):
        needed = " ".join(f"{name}=..." for name in sorted(wanted))
        raise SpikelmError(f"{needed} are needed; got {' '.join(options.fields)}")
    inputs = Inputs(fields["teacher"], fields["data"], fields["sst2"], fields["blimp"].split(","), options.runs)
    runs = train_missing(inputs)
    settings = {"context_length": CONTEXT_LENGTH, "energy_contexts": COUNTED, "prompt": PROMPT, "new_tokens": NEW}
    result = {
        "language_models": language_models(inputs, runs),
        "classifiers": classifiers(inputs, runs["sst2"]),
        "settings": settings | {"bert_steps": BERT_STEPS, "bert_sentences": BERT_SENTENCES},
        "command": "python benchmarks/systems.py teacher=... data=... sst2=... blimp=...",
        "versions": versions(),
    }
    print(json.dumps(result, indent=1))
    if options.output:
        write_json(options.output, result)


if __name__ == "__main__":
    command_line(main)
