"""Preference optimisation: the loss and its gradient, held-out accuracy, resuming, what stays as it was."""

import copy
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import spikelm
from spikelm.data import train_tokenizer
from spikelm.data.preferences import tokenise_pairs
from spikelm.distill.callbacks import read_metrics
from spikelm.distill.checkpoints import latest_checkpoint
from spikelm.distill.preference import completion_log_probabilities, preference_metrics, train_preferences
from spikelm.distill.trainer import collate
from spikelm.errors import SpikelmError
from spikelm.models.llamba import LlambaForCausalLM
from tests.small_models import llamba

OPTIONS: dict[str, Any] = {
    "steps": 8, "batch_size": 4, "learning_rate": 1e-3, "beta": 0.1, "save_steps": 3, "logging_steps": 1
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """300 tokens, bos 0, eos and pad 1."""
    return train_tokenizer("the cat saw a dog and a bird 0123456789 " * 50, 300)


def student(kind: str = "llamba") -> Any:
    """A random model of 300 embeddings in train mode, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "llamba":
            config = llamba().config
            config.vocab_size = 300
            return LlambaForCausalLM(config).train()
        model = Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=8, num_heads=4, head_dim=8, n_groups=1,
                chunk_size=8, initializer_range=0.3, pad_token_id=7,
            )
        )  # fmt: skip
        return (spikelm.spikify(model, "spikingmamba") if kind == "spiking" else model).train()


def pairs(count: int, first: int = 0) -> list[dict[str, str]]:
    """The cat is preferred to the dog; lengths differ."""
    return [
        {"prompt": f"{n * 37} saw", "chosen": " the cat" + " and" * (n % 3), "rejected": " a dog" + " bird" * (n % 2)}
        for n in range(first, first + count)
    ]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def curve(output_dir: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in line.items() if k != "wall_s"} for line in read_metrics(output_dir / "log.jsonl")]


def run(model: Any, tokenizer: Any, output_dir: Path, **more: Any) -> dict[str, Any]:
    return train_preferences(model, None, pairs(10), pairs(6, 10), tokenizer, output_dir=output_dir, **(OPTIONS | more))


@pytest.mark.parametrize("kind", ["llamba", "mamba2", "spiking"])
def test_held_out_accuracy_rises(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = student(kind)
    reference = copy.deepcopy(model)
    before, frozen = weights(model), weights(reference)
    options = OPTIONS | {"steps": 25, "learning_rate": 5e-3, "logging_steps": 5, "save_steps": 100}
    result = train_preferences(
        model, reference, pairs(24), pairs(12, 24), tokenizer, output_dir=tmp_path / "run", **options
    )
    assert json.loads(json.dumps(result)) == result
    assert result["held_out"]["before"] == {"accuracy": 0.5, "standard_error": 0.0, "margin": 0.0, "pairs": 12}
    after = result["held_out"]["after"]
    assert after["accuracy"] > 0.5 + 2 * after["standard_error"] and after["margin"] > 0
    assert preference_metrics(model, reference, pairs(12, 24), tokenizer, beta=0.1, batch_size=4) == after
    lines = read_metrics(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 25] and lines[-1]["loss"] < lines[0]["loss"]
    assert result["steps"] == 25 and result["rewards/margins"] == lines[-1]["rewards/margins"] and result["wall_s"] > 0
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters() if value.ndim > 1)
    assert all(torch.equal(value, frozen[name]) for name, value in reference.named_parameters())
    assert not reference.training and not any(value.requires_grad for value in reference.parameters())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-25", "log.jsonl"]


@pytest.mark.parametrize("kind", ["llamba", "mamba2", "spiking"])
def test_the_first_step_is_that_of_the_definition(
    kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = student(kind)
    rows = pairs(5)
    run_options = OPTIONS | {"steps": 1, "batch_size": 5, "max_grad_norm": 0.0, "beta": 0.3}
    expected = copy.deepcopy(model)
    train_preferences(model, None, rows, rows, tokenizer, output_dir=tmp_path, **run_options)
    (line,) = read_metrics(tmp_path / "log.jsonl")
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)
    # A slow loop: every sequence alone, unpadded
    sums: dict[str, list[Any]] = {"chosen": [], "rejected": []}
    for row in tokenise_pairs(rows, tokenizer):
        for name, found in sums.items():
            ids = torch.tensor([row["prompt_ids"] + row[f"{name}_ids"]])
            logits = expected(input_ids=ids).logits[0].log_softmax(-1)
            start = len(row["prompt_ids"])
            found.append(sum(logits[t - 1, ids[0, t]] for t in range(start, ids.shape[1])))
    assert line["logps/chosen"] == pytest.approx(sum(value.item() for value in sums["chosen"]) / 5, rel=1e-5)
    assert line["logps/rejected"] == pytest.approx(sum(value.item() for value in sums["rejected"]) / 5, rel=1e-5)
    # -log sigmoid has the slope -1/2 at 0
    (-0.5 * 0.3 * (sum(sums["chosen"]) - sum(sums["rejected"])) / 5).backward()
    gradients = [value.grad for value in expected.parameters() if value.grad is not None]
    assert line["grad_norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-4)


def test_metrics_against_a_count_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    reference = student().eval()
    model = copy.deepcopy(reference).train()
    rows = pairs(7)
    assert preference_metrics(model, reference, rows, tokenizer, beta=1.0, batch_size=3) == {
        "accuracy": 0.5, "standard_error": 0.0, "margin": 0.0, "pairs": 7
    }  # fmt: skip
    assert model.training
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    margins = []
    for row in tokenise_pairs(rows, tokenizer):
        ratios = []
        for name in ("chosen_ids", "rejected_ids"):
            sequence = row["prompt_ids"] + row[name]
            batch = collate([{"input_ids": sequence, "labels": [-100] * len(row["prompt_ids"]) + row[name]}])
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            with torch.no_grad():
                ratios.append(float(completion_log_probabilities(model.eval(), batch)) - float(
                    completion_log_probabilities(reference, batch)
                ))  # fmt: skip
        margins.append(2.0 * (ratios[0] - ratios[1]))
    share = sum(margin > 0 for margin in margins) / 7
    assert 0 < share < 1
    found = preference_metrics(model, reference, rows, tokenizer, beta=2.0, batch_size=3)
    assert found["accuracy"] == pytest.approx(share) and found["margin"] == pytest.approx(sum(margins) / 7, rel=1e-4)
    assert found["standard_error"] == pytest.approx(math.sqrt(share * (1 - share) / 7))
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(SpikelmError, match="log-probability of the pairs is not finite"):
        preference_metrics(model, reference, rows, tokenizer, beta=1.0, batch_size=3)


class StopAt(TrainerCallback):
    """Raises at the end of a step, or asks for the signal of Ctrl-C."""

    def __init__(self, step: int, error: Exception | None) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert kwargs["model"].training, "neurons with a training-only path train with it"
        if state.global_step == self.step:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", ["error", "interrupt"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    how: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    whole = student()
    expected = run(whole, tokenizer, tmp_path / "whole")
    kind: type[BaseException] = RuntimeError if how == "error" else KeyboardInterrupt
    stop = StopAt(5, RuntimeError("broken") if how == "error" else None)
    with pytest.raises(kind):
        run(student(), tokenizer, tmp_path / "broken", callbacks=[stop])
    latest = latest_checkpoint(tmp_path / "broken")
    assert latest is not None and latest.name in (
        ["checkpoint-3"] if how == "error" else ["checkpoint-5", "checkpoint-6"]
    )
    model = student()
    result = run(model, tokenizer, tmp_path / "broken")
    assert curve(tmp_path / "broken") == curve(tmp_path / "whole")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in model.named_parameters())
    assert result["held_out"] == expected["held_out"]
    # Once more: the finished run is loaded, not repeated
    again = student()
    assert run(again, tokenizer, tmp_path / "broken") == result
    assert all(torch.equal(value, weights(whole)[name]) for name, value in again.named_parameters())
    with pytest.raises(SpikelmError, match="already holds checkpoints"):
        run(student(), tokenizer, tmp_path / "broken", resume=False)


def test_frozen_embeddings_stay_and_nothing_else_is_left_behind(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import trl.trainer.base_trainer

    def refuse(*given: Any, **named: Any) -> None:
        raise AssertionError("asks the network")

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", refuse)
    monkeypatch.delenv("CI", raising=False)
    model = student("mamba2")
    model.backbone.layers[0].mixer.drop = nn.Dropout(0.3)
    model.get_input_embeddings().requires_grad_(False)
    assert model.lm_head.weight is model.get_input_embeddings().weight or not model.config.tie_word_embeddings
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    holders = (model.config, model.generation_config)
    before, special = weights(model), [getattr(holder, name) for holder in holders for name in tokens]
    padless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    with caplog.at_level(logging.WARNING):
        run(model, padless, tmp_path / "run", bf16=True, gradient_checkpointing=True)
    assert "no pad token: its eos token </s> pads" in caplog.text
    assert padless.pad_token is None
    assert [getattr(holder, name) for holder in holders for name in tokens] == special
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)
    assert not model.is_activation_checkpointing and model.training and model.model_tags is None
    assert model.backbone.layers[0].mixer.drop.p == 0.3
    after = weights(model)
    embedding = "backbone.embeddings.weight"
    assert torch.equal(after[embedding], before[embedding]) and not model.get_input_embeddings().weight.requires_grad
    assert not torch.equal(
        after["backbone.layers.0.mixer.in_proj.weight"], before["backbone.layers.0.mixer.in_proj.weight"]
    )
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.dtype == torch.float32


def test_bf16_and_checkpointing_change_little(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    full = run(student(), tokenizer, tmp_path / "full")
    recomputed = run(student(), tokenizer, tmp_path / "recomputed", gradient_checkpointing=True)
    assert recomputed["loss"] == pytest.approx(full["loss"], rel=1e-5)
    half = run(student(), tokenizer, tmp_path / "half", bf16=True)
    assert half["loss"] == pytest.approx(full["loss"], rel=0.1) and half["loss"] != full["loss"]


def test_accumulated_micro_batches_equal_one_batch(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, size, accumulation in (("one", 4, 1), ("two", 2, 2)):
        train_preferences(
            student(), None, pairs(8), pairs(2, 8), tokenizer, output_dir=tmp_path / name,
            **(OPTIONS | {"steps": 2, "batch_size": size, "gradient_accumulation": accumulation}),
        )  # fmt: skip
    one, two = (read_metrics(tmp_path / name / "log.jsonl") for name in ("one", "two"))
    for first, second in zip(one, two, strict=True):
        for term in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert second[term] == pytest.approx(first[term], rel=1e-4, abs=1e-6)


def test_an_update_that_is_not_finite_is_left_out(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spikelm.distill.preference_trainer import PreferenceTrainer

    plain = PreferenceTrainer.compute_loss

    def third_is_nan(self: Any, *args: Any, **named: Any) -> Any:
        return plain(self, *args, **named) * (float("nan") if self.state.global_step == 2 else 1)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", third_is_nan)
    result = run(student(), tokenizer, tmp_path / "run")
    lines = curve(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 0, *[1] * 6] and result["skipped_updates"] == 1
    assert [line["step"] for line in lines if "loss" not in line and "rewards/margins" not in line] == [3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    with pytest.raises(SpikelmError, match="the loss is nan at step 3"):
        run(student(), tokenizer, tmp_path / "other", max_skipped_updates=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1"),
        ({"beta": 0.0}, "beta must be finite and > 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, given -0.1"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be finite and >= 0"),
        ({"schedule": "step"}, "one of cosine, linear, constant"),
        ({"max_length": 5}, r"train_pairs: the longest pair has \d+ tokens, max_length=5"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(SpikelmError, match=message):
        run(student(), tokenizer, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_models_and_pairs_that_do_not_fit(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def attempt(model: Any, reference: Any, train: Any = None, held_out: Any = None) -> None:
        held_out = pairs(2) if held_out is None else held_out
        train = pairs(2) if train is None else train
        train_preferences(model, reference, train, held_out, tokenizer, output_dir=tmp_path, **OPTIONS)

    model = student()
    with pytest.raises(SpikelmError, match="same object"):
        attempt(model, model)
    with pytest.raises(SpikelmError, match="tokenizer has .* tokens and the model a vocabulary of 64"):
        attempt(llamba(), None)
    with pytest.raises(SpikelmError, match="the reference's vocabulary has 64 entries, the student's 300"):
        attempt(model, llamba())
    with pytest.raises(SpikelmError, match="held_out_pairs holds no pairs"):
        attempt(model, None, held_out=[])
    with pytest.raises(SpikelmError, match="train_pairs: pair 2: chosen and rejected are the same tokens"):
        attempt(model, None, train=[*pairs(1), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(SpikelmError, match="head is a Sequential; a plain nn.Linear"):
        attempt(model, None)


def test_without_trl(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SpikelmError, match=r"need TRL.*pip install 'spikelm\[rl\]'"):
        run(student(), tokenizer, tmp_path)
    model = student()
    found = preference_metrics(model, copy.deepcopy(model), pairs(3), tokenizer, beta=0.1, batch_size=2)
    assert found["accuracy"] == 0.5


def test_importing_does_not_import_trl(repository: Path) -> None:
    script = "import sys, spikelm.distill, spikelm.distill.preference; assert 'trl' not in sys.modules"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=repository, env=environment, check=True)


def test_a_sharded_student_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIKELM_LAUNCHED_FSDP", "true")  # what joining the others finds in the launcher's variables
    with pytest.raises(SpikelmError, match="whole student on every process: launch it without --use_fsdp"):
        run(student(), tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()
