"""BiSpikCLM from beginning to end: a language model of binary spikes, distilled from a softmax teacher by SpAD.

    python examples/bispikclm/train.py --preset tiny teacher=PATH_OR_HUB_ID data=stories.txt output_dir=runs/bispikclm

The teacher is any causal language model whose attention gives maps (OPT, Llama, ...); without teacher= and data= a
small Llama is trained on the documentation that Python carries. The student starts from random weights. Beside it an
OPT of the same shape is trained (dense=false leaves it out), and a unigram and a bigram model are counted. Presets are
in examples/bispikclm/presets; any field may follow as field=value (--help lists them). The same command resumes an
interrupted run. output_dir gets student, dense, metrics.json and figures/.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from settings import Config
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, set_seed

from spikelm import plot
from spikelm.distributed import on_first_rank
from spikelm.errors import SpikelmError
from spikelm.evaluate import population_statistics
from spikelm.experiment import Experiment, embedded_teacher, say, teacher_seconds
from spikelm.models.bispikclm import BiSpikCLMConfig, BiSpikCLMForCausalLM
from spikelm.ngrams import ngram_cross_entropies
from spikelm.presets import config_from_command_line, to_dict
from spikelm.run import RunDirectory, command_line, keep_freed_memory, versions

PRESETS = Path(__file__).parent / "presets"


def check(config: Config) -> None:
    """Refuses now what would be refused only once a teacher is trained or loaded."""
    config.check()
    config.objective()
    config.optimisation.check("optimisation")
    config.model_config(OPTConfig())
    longest = config.student.max_position_embeddings
    if longest is not None and longest < config.context_length:
        raise SpikelmError(
            f"student.max_position_embeddings must be null or at least context_length {config.context_length}, "
            f"given {longest}"
        )


def prepare(config: Config, run: RunDirectory) -> Experiment:
    """The teacher, trained first if it is the embedded one, and the packed data."""
    path = config.teacher
    if path == "embedded":
        path = embedded_teacher(config, run, "llama", to_dict(config.embedded_teacher))
    return Experiment.open(config, run, path)


def distil(experiment: Experiment, config: Config, name: str = "student") -> tuple[PreTrainedModel, dict[str, Any]]:
    """The spiking student and the record of its training in training/<name>."""
    set_seed(config.seed)
    student = BiSpikCLMForCausalLM(config.model_config(experiment.teacher.config))
    return _trained(experiment, config, name, student)


def distil_dense(experiment: Experiment, config: Config) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same without spikes: an OPT of the student's shape, with softmax attention, ReLU and norms."""
    set_seed(config.seed)
    shape = config.model_config(experiment.teacher.config)
    dense = OPTForCausalLM(dense_config(shape))
    return _trained(experiment, config, "dense", dense)


def dense_config(shape: BiSpikCLMConfig) -> OPTConfig:
    """OPT of the student's shape, all of its weights drawn as wide as the student's first projections; eager maps."""
    return OPTConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.hidden_size, ffn_dim=shape.ffn_dim,
        num_hidden_layers=shape.num_hidden_layers, num_attention_heads=shape.num_attention_heads,
        max_position_embeddings=shape.max_position_embeddings, word_embed_proj_dim=shape.hidden_size,
        dropout=0.0, attention_dropout=0.0, init_std=shape.initializer_gain / shape.hidden_size**0.5,
        bos_token_id=shape.bos_token_id, eos_token_id=shape.eos_token_id, pad_token_id=shape.pad_token_id,
        attn_implementation="eager",
    )  # fmt: skip


def _trained(
    experiment: Experiment, config: Config, name: str, student: PreTrainedModel
) -> tuple[PreTrainedModel, dict[str, Any]]:
    student.to(experiment.teacher.device)  # type: ignore[arg-type]
    student.train()
    return student, experiment.train(name, student, experiment.teacher, config.objective(), config.optimisation)


def report(experiment: Experiment, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """metrics.json and the figures."""
    run, settings = experiment.run, experiment.settings
    metrics: dict[str, Any] = {name: experiment.evaluate(model) for name, model in models.items()}
    vocabulary = models["teacher"].config.vocab_size
    if not settings.streaming:
        held_out = islice(experiment.held_out, settings.evaluation_contexts)
        metrics["ngrams"] = ngram_cross_entropies(experiment.train_data, held_out, vocabulary)
    trained = [name for name in models if name != "teacher"]
    metrics["parameters"] = {name: model.num_parameters() for name, model in models.items()}
    metrics["training"] = {name: run.stage_record(name) for name in trained}
    metrics["wall_s"] = teacher_seconds(run) | {name: run.stage_record(name)["wall_s"] for name in trained}
    metrics["firing"] = population_statistics(
        models["student"], experiment.held_out, max_contexts=settings.evaluation_contexts
    )
    plot.firing_heatmap(metrics["firing"], experiment.figure("firing.png"), rate="firing_rate")
    draw_raster(models["student"], experiment)
    plot.loss_curves({name: experiment.log_of(name) for name in trained}, experiment.figure("losses.png"))
    metrics["config"], metrics["versions"] = to_dict(settings), versions()
    run.write_json("metrics.json", metrics)
    return metrics


@torch.no_grad()
def draw_raster(student: PreTrainedModel, experiment: Experiment) -> None:
    """The embedding's spikes over a sentence."""
    seen: list[torch.Tensor] = []
    neuron = student.get_submodule("model.input_neuron")
    handle = neuron.register_forward_hook(lambda module, inputs, spikes: seen.append(spikes[:, 0]))  # t l c
    ids = list(experiment.held_out[0]["input_ids"][:32])
    student(torch.tensor([ids], device=student.device))
    handle.remove()
    tokens = [experiment.tokenizer.decode([i]) for i in ids]
    plot.raster(seen[0].cpu(), experiment.figure("raster.png"), tokens=tokens, title="Spikes of the embedding")


def print_table(metrics: dict[str, Any]) -> None:
    """The result, on stdout."""
    columns = ("ce", "perplexity", "bits_per_byte", "kl_to_teacher", "reverse_kl")
    print(f"\n{'model':<12}" + "".join(f"{column:>16}" for column in columns))
    for name in ("teacher", "student", "dense"):
        if name in metrics:
            print(f"{name:<12}" + "".join(f"{metrics[name][column]:>16.4f}" for column in columns))
    for name, cross_entropy in metrics.get("ngrams", {}).items():
        print(f"{name:<12}{cross_entropy:>16.4f}")
    firing = metrics["firing"]
    densities = ", ".join(f"{density:.3f}" for density in firing["map_density"])
    print(f"\nmean firing rate {firing['firing_rate']:.3f}; attention maps fire at {densities} of the pairs, by layer")
    print("wall seconds " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in metrics["wall_s"].items()))
    for name in ("teacher", "student"):
        print(f"\n[{name}] {metrics[name]['sample']}")


def main() -> None:
    """Read the configuration, distil, report."""
    config = config_from_command_line(Config, PRESETS, description=str(__doc__), default_preset="tiny")
    check(config)
    keep_freed_memory()
    with RunDirectory(config.output_dir, to_dict(config), several_processes=True) as run:
        experiment = prepare(config, run)
        models = {"teacher": experiment.teacher}
        student = experiment.stage("student", lambda: distil(experiment, config))
        dense = experiment.stage("dense", lambda: distil_dense(experiment, config), asked=config.dense)
        models |= {name: model for name, model in (("student", student), ("dense", dense)) if model is not None}
        on_first_rank(lambda: print_table(report(experiment, models)))
        say(f"written: {run.path('metrics.json')}")


if __name__ == "__main__":
    command_line(main)
