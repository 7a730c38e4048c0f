"""The memory of a training, counted without allocating it."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import spikelm
from spikelm.distill import SBDS, Activity, SpAD
from spikelm.distill.objectives import Objective
from spikelm.distill.parallel import Parallel
from spikelm.distill.parameters import projections_attached
from spikelm.memory import training_memory
from spikelm.models.llamba import LlambaForCausalLM

SHAPE = (8, 64)


def pair() -> tuple[LlambaForCausalLM, LlamaForCausalLM]:
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, attn_implementation="eager",
    )  # fmt: skip
    teacher = LlamaForCausalLM(config).requires_grad_(False)
    student = LlambaForCausalLM.from_llama(teacher, chunk_size=16).requires_grad_(True)
    spikelm.spikify(student, spikelm.Recipe.preset("mar"))
    return student, teacher


def measured(student: LlambaForCausalLM, teacher: LlamaForCausalLM, objective: Objective) -> int:
    """What the profiler saw given out at the most in an update, and what was there before it."""
    student.train()
    with projections_attached(student, teacher, objective):
        optimizer = torch.optim.AdamW(student.parameters(), fused=True)

        def update() -> None:
            ids = torch.zeros(SHAPE, dtype=torch.long)
            objective(student, teacher, {"input_ids": ids}, SHAPE[0] * (SHAPE[1] - 1))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()

        update()
        held = sum(p.nbytes for model in (student, teacher) for p in model.parameters())
        held += sum(moment.nbytes for state in optimizer.state.values() for moment in state.values())
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            update()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    sizes = [size for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")]
    return held + int(torch.tensor(sizes).cumsum(0).max())


@pytest.mark.parametrize("objective", [SBDS(), Activity(SBDS(), target=0.1), SpAD()], ids=["sbds", "activity", "spad"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_count_is_what_is_measured(objective: Objective, checkpointing: bool) -> None:
    student, teacher = pair()
    before = {name: value.clone() for name, value in student.named_parameters()}
    found = training_memory(
        student, teacher, objective, batch_size=SHAPE[0], context_length=SHAPE[1], gradient_checkpointing=checkpointing
    )
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert not student.is_activation_checkpointing
    if checkpointing:
        student.activation_checkpointing_enable({"use_reentrant": False})
    assert found.peak == pytest.approx(measured(student, teacher, objective), rel=0.1)


def test_models_on_the_meta_device_count_the_same_and_take_nothing() -> None:
    options = {"batch_size": SHAPE[0], "context_length": SHAPE[1]}
    real = training_memory(*pair(), SBDS(), **options)
    with torch.device("meta"):
        models = pair()
    assert models[0].device.type == "meta"
    assert training_memory(*models, SBDS(), **options) == real


def test_processes_keep_their_parts() -> None:
    student, teacher = pair()
    options = {"batch_size": SHAPE[0], "context_length": SHAPE[1], "processes": 8}
    whole = training_memory(student, teacher, SBDS(), **options)
    parts = training_memory(student, teacher, SBDS(), **options, parallel=Parallel("sharded", "sharded"))
    host = training_memory(student, teacher, SBDS(), **options, parallel=Parallel("offloaded", "replicated"))
    size = sum(p.nbytes for p in student.parameters())
    assert (whole.parameters, whole.gradients, whole.optimizer, whole.buckets) == (size, size, 2 * size, size)
    assert (parts.parameters, parts.optimizer, parts.buckets) == (size // 8, size // 4, 0)
    assert (
        parts.teacher == whole.teacher // 8 and host.teacher == whole.teacher and whole.gathered == 0 < parts.gathered
    )
    assert host.offloaded == host.parameters + host.gradients + host.optimizer
    assert host.peak == host.teacher + host.gathered + host.activations


def test_half_precision_and_checkpoints_take_less() -> None:
    student, teacher = copy.deepcopy(pair())
    options = {"batch_size": SHAPE[0], "context_length": SHAPE[1]}
    dense = training_memory(student, teacher, SBDS(), **options)
    half = training_memory(student, teacher, SBDS(), **options, bf16=True)
    recomputed = training_memory(student, teacher, SBDS(), **options, gradient_checkpointing=True)
    assert half.activations < dense.activations and recomputed.activations < dense.activations
