"""Held-out figures against slow loops, firing rates against counting by hand, greedy text."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import spikelm.evaluate as evaluation
from spikelm.errors import SpikelmError
from spikelm.evaluate import batches, evaluate, firing_statistics, generate_sample
from spikelm.layers import SpikingLinear
from spikelm.neurons import ATMN

Rows = list[dict[str, list[int]]]


@pytest.fixture
def rows() -> Rows:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, 64, (12,), generator=generator).tolist()} for _ in range(5)]


def perturbed(model: Any, scale: float = 0.3) -> Any:
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return other


def slow_figures(model: Any, teacher: Any, rows: Rows) -> tuple[float, float, float, int]:
    """ce, KL(teacher||model), KL(model||teacher), tokens by one Python loop in float64."""
    ce = forward = reverse = 0.0
    tokens = 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            q = model(input_ids=ids).logits[0].double().softmax(-1)
            p = teacher(input_ids=ids).logits[0].double().softmax(-1)
        for position in range(ids.shape[1] - 1):
            ce -= math.log(q[position, ids[0, position + 1]])
            forward += sum((a * (a / b).log()).item() for a, b in zip(p[position], q[position], strict=True))
            reverse += sum((b * (b / a).log()).item() for a, b in zip(p[position], q[position], strict=True))
            tokens += 1
    return ce / tokens, forward / tokens, reverse / tokens, tokens


@pytest.mark.parametrize("logit_elements", [1, 64 * 7, 2**24])
def test_figures_equal_a_slow_loop(
    tiny_llama: Any, rows: Rows, logit_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "LOGIT_ELEMENTS", logit_elements)
    student = perturbed(tiny_llama)
    found = evaluate(student, rows, teacher=tiny_llama, batch_size=2, bytes_per_token=3.0)
    ce, forward, reverse, tokens = slow_figures(student, tiny_llama, rows)
    assert forward > 0.01
    assert abs(forward - reverse) > 1e-3  # so that swapped directions fail
    assert found["ce"] == pytest.approx(ce, rel=1e-5)
    assert found["kl_to_teacher"] == pytest.approx(forward, rel=1e-4)
    assert found["reverse_kl"] == pytest.approx(reverse, rel=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(ce), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(ce / math.log(2) / 3.0, rel=1e-5)
    assert found["tokens"] == tokens == 55


def test_ce_is_the_model_s_own_loss(tiny_llama: Any, rows: Rows) -> None:
    ids = torch.tensor([row["input_ids"] for row in rows])
    found = evaluate(tiny_llama, rows)
    assert found["ce"] == pytest.approx(tiny_llama(input_ids=ids, labels=ids).loss.item(), rel=1e-6)
    assert found["kl_to_teacher"] is found["reverse_kl"] is found["bits_per_byte"] is None


def test_a_model_does_not_diverge_from_itself(tiny_llama: Any, rows: Rows) -> None:
    found = evaluate(tiny_llama, rows, teacher=tiny_llama)
    assert found["kl_to_teacher"] == found["reverse_kl"] == 0


def test_batches_do_not_change_the_figures_and_max_contexts_does(tiny_llama: Any, rows: Rows) -> None:
    whole = evaluate(tiny_llama, rows, batch_size=16)
    assert evaluate(tiny_llama, rows, batch_size=1)["ce"] == pytest.approx(whole["ce"], rel=1e-6)
    assert evaluate(tiny_llama, iter(rows), batch_size=3)["ce"] == pytest.approx(whole["ce"], rel=1e-6)
    assert evaluate(tiny_llama, rows, batch_size=2, max_contexts=3)["tokens"] == 33


def test_rows_of_a_hugging_face_dataset(tiny_llama: Any, rows: Rows) -> None:
    datasets = pytest.importorskip("datasets")
    found = evaluate(tiny_llama, datasets.Dataset.from_list(rows))
    assert found == evaluate(tiny_llama, rows)


def test_every_module_keeps_its_own_mode_and_no_gradients(tiny_llama: Any, rows: Rows) -> None:
    tiny_llama.train()
    tiny_llama.model.norm.eval()
    evaluate(tiny_llama, rows)
    assert tiny_llama.training
    assert not tiny_llama.model.norm.training
    assert all(parameter.grad is None for parameter in tiny_llama.parameters())

    tiny_llama.forward = None  # a model that fails keeps its mode too
    with pytest.raises(TypeError):
        evaluate(tiny_llama, rows)
    assert tiny_llama.training


def test_bfloat16_logits_are_summed_in_float32(tiny_llama: Any, rows: Rows) -> None:
    exact = evaluate(tiny_llama, rows)["ce"]
    assert evaluate(copy.deepcopy(tiny_llama).bfloat16(), rows)["ce"] == pytest.approx(exact, rel=1e-2)


def test_bad_datasets_are_named(tiny_llama: Any, rows: Rows) -> None:
    with pytest.raises(SpikelmError, match="no context"):
        evaluate(tiny_llama, [])
    with pytest.raises(SpikelmError, match=r"one length of at least 2 tokens are accepted, found \[3, 12\]"):
        evaluate(tiny_llama, [rows[0], {"input_ids": [1, 2, 3]}])
    with pytest.raises(SpikelmError, match=r"found \[1\]"):
        evaluate(tiny_llama, [{"input_ids": [1]}])
    with pytest.raises(SpikelmError, match="token id 64 is outside of the model's vocabulary of 64"):
        evaluate(tiny_llama, [{"input_ids": [1, 64]}])
    with pytest.raises(SpikelmError, match="batch_size=0"):
        evaluate(tiny_llama, rows, batch_size=0)
    with pytest.raises(SpikelmError, match="max_contexts=0"):
        evaluate(tiny_llama, rows, max_contexts=0)


def test_a_teacher_of_another_vocabulary_is_refused(tiny_llama: Any, rows: Rows) -> None:
    other = copy.deepcopy(tiny_llama)
    other.resize_token_embeddings(70)
    with pytest.raises(SpikelmError, match="teacher's vocabulary has 70 entries, the model's 64"):
        evaluate(tiny_llama, rows, teacher=other)


def test_a_diverged_model_is_an_error(tiny_llama: Any, rows: Rows) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight.fill_(math.nan)
    with pytest.raises(SpikelmError, match="ce nan.*diverged"):
        evaluate(tiny_llama, rows)


def test_batches_cover_the_rows_in_order(rows: Rows) -> None:
    parts = list(batches(rows, 2))
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.cat(parts).tolist() == [row["input_ids"] for row in rows]


@pytest.fixture
def spiking_llama(tiny_llama: Any) -> Any:
    """The tiny Llama with a bank of neurons shared by gate and up, and one before down, in its second layer."""
    layer = tiny_llama.model.layers[1].mlp

    def bank(channels: int, threshold: float) -> ATMN:
        return ATMN(tau=1.0, v_threshold=threshold, num_channels=channels, T=3)

    layer.gate_proj = SpikingLinear.from_linear(layer.gate_proj, bank(32, 0.7))
    layer.up_proj = SpikingLinear.from_linear(layer.up_proj, layer.gate_proj.neuron, shares_with=layer.gate_proj)
    layer.down_proj = SpikingLinear.from_linear(layer.down_proj, bank(48, 1e-4))
    return tiny_llama


def site_named(statistics: dict[str, Any], ending: str) -> dict[str, Any]:
    (site,) = [rates for name, rates in statistics["sites"].items() if name.endswith(ending)]
    assert isinstance(site, dict)
    return site


def test_firing_rates_equal_counting_by_hand(spiking_llama: Any, rows: Rows) -> None:
    seen: list[torch.Tensor] = []
    gate = spiking_llama.model.layers[1].mlp.gate_proj
    handle = gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    statistics = firing_statistics(spiking_llama, rows, batch_size=2, max_contexts=None)
    handle.remove()
    assert len(statistics["sites"]) == 2

    frames = gate.neuron.encode(torch.cat(seen)).double()  # [T, B, L, C]
    site = site_named(statistics, "gate_proj")
    assert site["channels"] == 32
    assert site["rate_per_step"] == pytest.approx(frames.abs().mean((1, 2, 3)).tolist(), rel=1e-12)
    assert site["sum_of_rates"] == pytest.approx(frames.abs().sum(0).mean().item(), rel=1e-12)
    assert site["union_rate"] == pytest.approx((frames != 0).any(0).double().mean().item(), rel=1e-12)
    assert site["positive_rate"] == pytest.approx((frames > 0).double().sum(0).mean().item(), rel=1e-12)
    assert 0 < site["union_rate"] < site["sum_of_rates"]  # some neurons fire twice here
    assert 0 < site["positive_rate"] < site["sum_of_rates"]


def test_firing_rates_are_averaged_over_sites_and_over_channels(spiking_llama: Any, rows: Rows) -> None:
    statistics = firing_statistics(spiking_llama, rows)
    gate, down = site_named(statistics, "gate_proj"), site_named(statistics, "down_proj")
    for rate in ("sum_of_rates", "union_rate"):
        assert abs(gate[rate] - down[rate]) > 0.05
        assert statistics[rate] == pytest.approx((gate[rate] + down[rate]) / 2)
        assert statistics[f"{rate}_weighted"] == pytest.approx((32 * gate[rate] + 48 * down[rate]) / 80)


def test_counting_leaves_the_model_as_it_was(spiking_llama: Any, rows: Rows) -> None:
    before = evaluate(spiking_llama, rows)
    first = firing_statistics(spiking_llama, rows, batch_size=2)
    assert firing_statistics(spiking_llama, rows, batch_size=5)["sum_of_rates"] == pytest.approx(first["sum_of_rates"])
    assert evaluate(spiking_llama, rows) == before
    assert not any(module._forward_pre_hooks for module in spiking_llama.modules())


def test_hooks_go_when_counting_fails(spiking_llama: Any) -> None:
    with pytest.raises(SpikelmError, match="no context"):
        firing_statistics(spiking_llama, [])
    assert not any(module._forward_pre_hooks for module in spiking_llama.modules())


def test_models_without_spikes_are_refused(tiny_llama: Any, rows: Rows) -> None:
    with pytest.raises(SpikelmError, match="no spiking projections"):
        firing_statistics(tiny_llama, rows)


def test_a_site_that_is_never_reached_is_named(spiking_llama: Any, rows: Rows) -> None:
    spare = SpikingLinear.from_linear(nn.Linear(4, 4), ATMN(num_channels=4))
    spiking_llama.model.spare = spare
    with pytest.raises(SpikelmError, match="spare"):
        firing_statistics(spiking_llama, rows)


@pytest.fixture
def tokenizer() -> Any:
    """A tokenizer of 64 words w0 ... with <s> = 1 and </s> = 2."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_samples_are_greedy_and_start_with_bos(tiny_llama: Any, tokenizer: Any) -> None:
    ids = [1, 5, 9]
    for _ in range(6):
        ids.append(int(tiny_llama(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert 2 not in ids
    tiny_llama.generation_config.do_sample = True
    tiny_llama.train()
    assert generate_sample(tiny_llama, tokenizer, "w5 w9", 6) == tokenizer.decode(ids, skip_special_tokens=True)
    assert tiny_llama.training


def test_samples_stop_at_the_end_token(tiny_llama: Any, tokenizer: Any) -> None:
    with torch.no_grad():  # logits that always favour </s>
        tiny_llama.lm_head.weight.zero_()
        tiny_llama.model.norm.weight.zero_()
        tiny_llama.lm_head.bias = nn.Parameter(torch.eye(64)[2])
    assert generate_sample(tiny_llama, tokenizer, "w5", 6) == "w5"


def test_bad_prompts_are_named(tiny_llama: Any, tokenizer: Any) -> None:
    with pytest.raises(SpikelmError, match="max_new_tokens=0"):
        generate_sample(tiny_llama, tokenizer, "w5", 0)
    tokenizer.bos_token = None
    with pytest.raises(SpikelmError, match="prompt is empty"):
        generate_sample(tiny_llama, tokenizer, "", 3)


def test_the_real_teacher_writes_a_story(teacher_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(teacher_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(teacher_path)
    text = generate_sample(model, tokenizer, "Once upon a time", 30)
    assert text.strip().startswith("Once upon a time")
    assert len(text) > 60
