"""A teacher's likeliest tokens on disk: made in pieces, mapped, checked; and the divergence from them."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from spikelm.data import teacher_store
from spikelm.data.teacher_store import TeacherStore, collate_stored, store_teacher
from spikelm.distill import LogitDistillation
from spikelm.distill.callbacks import read_metrics
from spikelm.distill.stored import StoredDistillation, stored_divergence
from spikelm.distill.trainer import train
from spikelm.errors import SpikelmError
from spikelm.files import write_json

CONTEXTS = np.random.default_rng(0).integers(0, 64, (13, 9))


def llama(seed: int = 0) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            initializer_range=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def test_the_store_holds_what_the_teacher_says(tmp_path: Path) -> None:
    teacher = llama()
    store = store_teacher(tmp_path / "store", teacher, CONTEXTS, k=5, batch_size=4)
    store.verify()
    batch = collate_stored([store[number] for number in range(len(store))])
    assert torch.equal(batch["input_ids"], torch.from_numpy(CONTEXTS))
    with torch.no_grad():
        expected = teacher(batch["input_ids"]).logits.log_softmax(-1).topk(5)
    assert torch.equal(batch["teacher_ids"], expected.indices)
    torch.testing.assert_close(batch["teacher_log_probs"].float(), expected.values, rtol=1e-3, atol=1e-3)
    again = TeacherStore(tmp_path / "store", teacher)
    assert isinstance(again.arrays["teacher_ids"], np.memmap)
    with pytest.raises(SpikelmError, match="another teacher"):
        TeacherStore(tmp_path / "store", llama(1))


def test_an_interrupted_store_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, asked = llama(), []
    likeliest = teacher_store.likeliest

    def fail_late(model: Any, rows: np.ndarray, k: int) -> Any:
        asked.append(len(rows))
        if len(asked) == 40:
            raise KeyboardInterrupt
        return likeliest(model, rows, k)

    contexts = np.concatenate([CONTEXTS] * 5)  # 65 of them, one at a time; every 32 are noted
    monkeypatch.setattr(teacher_store, "likeliest", fail_late)
    with pytest.raises(KeyboardInterrupt):
        store_teacher(tmp_path / "store", teacher, contexts, k=3, batch_size=1)
    with pytest.raises(SpikelmError, match="holds 32 of 65 contexts"):
        TeacherStore(tmp_path / "store")
    for change, message in (
        ({"k": 4}, "k 3 there, 4 asked"),
        ({"contexts": contexts[:, ::-1]}, "data"),
        ({"teacher": llama(1)}, "teacher"),
    ):
        given: dict[str, Any] = {"teacher": teacher, "contexts": contexts, "k": 3} | change
        with pytest.raises(SpikelmError, match=f"another store .{message}"):
            store_teacher(tmp_path / "store", batch_size=1, **given)
    store = store_teacher(tmp_path / "store", teacher, contexts, k=3, batch_size=1)
    assert len(asked) == 40 + 33
    whole = store_teacher(tmp_path / "whole", teacher, contexts, k=3, batch_size=1)
    assert all(np.array_equal(store.arrays[name], whole.arrays[name]) for name in whole.arrays)


def test_a_damaged_store_is_named(tmp_path: Path) -> None:
    store = store_teacher(tmp_path / "store", llama(), CONTEXTS, k=2)
    writable = np.lib.format.open_memmap(store.directory / "input_ids.npy", "r+")
    writable[0, 0] += 1
    writable.flush()
    with pytest.raises(SpikelmError, match="the contexts are not those"):
        TeacherStore(store.directory).verify()
    writable[0, 0] -= 1
    writable.flush()
    TeacherStore(store.directory).verify()
    for name in ("teacher_ids", "teacher_log_probs"):
        writable = np.lib.format.open_memmap(store.directory / f"{name}.npy", "r+")
        writable[3, 2] = writable[3, 2, ::-1].copy()  # values that might well be a teacher's
        writable.flush()
        with pytest.raises(SpikelmError, match="the teacher's answers are not those"):
            TeacherStore(store.directory).verify()
        writable[3, 2] = writable[3, 2, ::-1].copy()
        writable.flush()
    path = store.directory / "teacher_ids.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(SpikelmError, match="teacher_ids.npy is missing or damaged"):
        TeacherStore(store.directory)
    index = store.directory / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"rows": "many"}))
    with pytest.raises(SpikelmError, match="damaged"):
        TeacherStore(store.directory)
    with pytest.raises(SpikelmError, match="holds no teacher's store"):
        TeacherStore(tmp_path / "absent")
    with pytest.raises(SpikelmError, match="k must be in 1 .. 64"):
        store_teacher(tmp_path / "other", llama(), CONTEXTS, k=65)


def test_nothing_of_the_user_is_overwritten(tmp_path: Path) -> None:
    np.save(tmp_path / "input_ids.npy", np.arange(5))
    with pytest.raises(SpikelmError, match="holds files that are no store's .input_ids.npy"):
        store_teacher(tmp_path, llama(), CONTEXTS, k=2)
    assert np.array_equal(np.load(tmp_path / "input_ids.npy"), np.arange(5))


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_store_killed_as_it_began_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """In the first write of the index; while the arrays are laid out; in the write that says they are."""
    calls = []

    def write_and_die(path: Path, value: Any) -> Any:
        calls.append(value)
        if len(calls) == 1 + killed_at // 2:
            path.with_name(path.name + ".partial").write_text("{")
            raise KeyboardInterrupt
        return write_json(path, value)

    def lay_out_and_die(directory: Path, *arguments: Any) -> None:
        (directory / "input_ids.npy").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if killed_at == 1:
            patch.setattr(teacher_store, "_lay_out", lay_out_and_die)
        else:
            patch.setattr(teacher_store, "write_json", write_and_die)
        store_teacher(tmp_path / "store", llama(), CONTEXTS, k=2)
    with pytest.raises(SpikelmError):
        TeacherStore(tmp_path / "store")
    store_teacher(tmp_path / "store", llama(), CONTEXTS, k=2).verify()


def test_the_divergence_is_a_part_of_the_whole_one_and_all_of_it_with_every_token() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 20, generator=generator) for _ in range(2))
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    whole = (log_p.exp() * (log_p - log_q)).sum(-1)
    before = torch.zeros(7)
    for k in (1, 4, 12, 20):
        top = log_p.topk(k)
        found = stored_divergence(top.indices, top.values, student)
        assert (found >= before - 1e-5).all() and (found <= whole + 1e-5).all()
        before = found
    torch.testing.assert_close(before, whole)
    top = log_p.topk(4)  # by hand: four tokens and the rest
    p, q = top.values.exp(), log_q.gather(-1, top.indices).exp()
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    by_hand = (p * (p / q).log()).sum(-1) + rest_p * (rest_p / rest_q).log()
    torch.testing.assert_close(stored_divergence(top.indices, top.values, student), by_hand)


def test_a_student_learns_from_the_store_what_the_teacher_would_say(tmp_path: Path) -> None:
    teacher, student = llama(), llama(1)
    store = store_teacher(tmp_path / "store", teacher, CONTEXTS, k=64)
    batch = collate_stored([store[number] for number in range(4)])
    stored = StoredDistillation(chunk_size=10)(student, nn.Identity(), batch)["loss"]
    online = LogitDistillation()(student, teacher.requires_grad_(False), {"input_ids": batch["input_ids"]})["loss"]
    assert stored.item() == pytest.approx(online.item(), rel=1e-2)  # float16 on the disk
    with pytest.raises(SpikelmError, match="a batch of a teacher's store"):
        StoredDistillation()(student, nn.Identity(), {"input_ids": batch["input_ids"]})
    trained = copy.deepcopy(student)
    train(
        trained, nn.Identity(), store, StoredDistillation(), output_dir=tmp_path / "run", steps=30, batch_size=4,
        learning_rate=1e-2, logging_steps=1, data_collator=collate_stored,
    )  # fmt: skip
    lines = read_metrics(tmp_path / "run" / "log.jsonl")
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]


@pytest.mark.parametrize("k", [20, 18])
def test_tokens_that_the_teacher_excludes_count_for_nothing(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(7, 20, generator=generator) for _ in range(2))
    teacher[:, 15:] = -torch.inf
    top = teacher.log_softmax(-1).topk(k)
    student.requires_grad_(True)
    found = stored_divergence(top.indices, top.values.half(), student)
    p, log_p = teacher.softmax(-1)[:, :15], teacher.log_softmax(-1)[:, :15]
    torch.testing.assert_close(found, (p * (log_p - student.log_softmax(-1)[:, :15])).sum(-1), rtol=2e-3, atol=2e-3)
    found.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
