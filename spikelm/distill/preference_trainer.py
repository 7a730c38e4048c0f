"""TRL's DPOTrainer with what RobustTrainer adds. Needs trl; `spikelm.distill.preference` imports it when it trains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from spikelm.distill.robust import RobustTrainer, require_one_device
from spikelm.distill.sharing import FILLER, loader_of_trainer
from spikelm.errors import SpikelmError


class PreferenceTrainer(RobustTrainer, DPOTrainer):
    """DPO on pairs that are tokenised already (spikelm.data.preferences.tokenise_pairs).

    The loss is the mean over the pairs of the whole update, and TRL's figures are means over the pairs or tokens since
    the last log, over all processes; in TRL they are means of the means of batches. The reference is put on the
    student's device, frozen and set to eval mode, and stays so. Nothing asks the network: neither model cards nor
    telemetry.

    Args:
        student, reference: transformers causal language models with a plain nn.Linear as their head.
        args: trl.DPOConfig; save_total_limit counts whole checkpoints.
        **options: further arguments of trl.DPOTrainer.
    """

    def __init__(self, student: nn.Module, reference: nn.Module, args: DPOConfig, **options: Any) -> None:
        require_one_device(args)
        self.student = student
        self.reference = reference.eval().requires_grad_(False)
        models: dict[str, Any] = {"model": student, "ref_model": reference}
        super().__init__(**models, args=args, **options)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole update
        self._last: dict[str, float] = {}
        self._update: list[tuple[str, float, int]] = []  # figures of the update that runs, and what they are means over
        self._sums: dict[str, float] = defaultdict(float)  # of the updates since the last log
        self._counts: dict[str, int] = defaultdict(int)

    def frozen_models(self) -> dict[str, nn.Module]:
        """The reference."""
        return {"reference": self.reference}

    def loss_terms(self) -> dict[str, float]:
        """What TRL found in the last batch: log-probabilities, rewards and logits of both completions."""
        return self._last

    def get_train_dataloader(self) -> Any:
        """As in Trainer; several processes share each batch of one process, pair by pair."""
        return super().get_train_dataloader() if self.args.world_size == 1 else loader_of_trainer(self)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """Pairs of one update, over all its micro-batches and processes."""
        count = torch.tensor(sum(map(counted_pairs, batch_samples)), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """A batch's part of the mean; under several processes times their number, as their gradients are averaged."""
        if return_outputs:
            raise SpikelmError("PreferenceTrainer does not evaluate: use spikelm.distill.preference.preference_metrics")
        pairs = counted_pairs(inputs)
        inputs.pop(FILLER, None)
        with _nothing_gathered(self.accelerator):
            loss: Tensor = super().compute_loss(model, inputs)
        self._add_figures(inputs, pairs)
        return loss * (self.args.world_size * pairs / (pairs if num_items_in_batch is None else num_items_in_batch))

    def _add_figures(self, inputs: Mapping[str, Tensor], pairs: int) -> None:
        """Takes TRL's figures of this batch."""
        self._last = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        self._metrics["train"].clear()
        self._last.pop("num_tokens", None)  # a count that begins at 0 again after a resume
        chosen, rejected = (int(part.sum()) for part in inputs["completion_mask"][:, 1:].chunk(2))
        tokens = {"logits/chosen": chosen, "logits/rejected": rejected, "mean_token_accuracy": chosen}
        tokens["entropy"] = chosen + rejected
        for name, value in self._last.items():
            self._update.append((name, value, min(pairs, 1) * tokens.get(name, pairs)))  # a filler counts for nothing

    def update_ends(self, loss_is_finite: bool) -> None:
        """Its figures count with its loss."""
        for name, value, count in self._update if loss_is_finite else ():
            self._sums[name] += value * count
            self._counts[name] += count
        self._update = []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add TRL's figures since the last log to Trainer's step logs."""
        if "loss" in logs and self._sums:
            sums = torch.tensor([[self._sums[name], self._counts[name]] for name in self._sums], dtype=torch.float64)
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()
            logs |= dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No README.md beside the checkpoints."""

    def _send_telemetry(self) -> None:
        pass


def counted_pairs(batch: Mapping[str, Tensor]) -> int:
    """Of a batch of sequences, chosen before rejected; none of a filler."""
    return 0 if FILLER in batch else len(batch["input_ids"]) // 2


@contextmanager
def _nothing_gathered(accelerator: Any) -> Iterator[None]:
    """TRL's figures stay this process's own: shares of a short batch differ in length, and a filler is none."""

    def as_given(value: Any, *args: Any, **options: Any) -> Any:
        return value

    accelerator.gather = accelerator.gather_for_metrics = as_given
    try:
        yield
    finally:
        del accelerator.gather, accelerator.gather_for_metrics
