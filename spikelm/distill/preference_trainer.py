"""TRL's DPOTrainer with what RobustTrainer adds. Needs trl; `spikelm.distill.preference` imports it when it trains."""

from __future__ import annotations

from typing import Any

from torch import nn
from trl import DPOConfig, DPOTrainer

from spikelm.distill.robust import RobustTrainer, require_one_device


class PreferenceTrainer(RobustTrainer, DPOTrainer):
    """DPO on pairs that are tokenised already (spikelm.data.preferences.tokenise_pairs).

    The reference is put on the student's device, frozen and set to eval mode, and stays so. Nothing asks the network:
    neither model cards nor telemetry.

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

    def frozen_models(self) -> dict[str, nn.Module]:
        """The reference."""
        return {"reference": self.reference}

    def loss_terms(self) -> dict[str, float]:
        """What TRL logged of the last batch: log-probabilities, rewards and logits of both completions."""
        return {name: values[-1] for name, values in self._metrics["train"].items() if values}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, without its count of tokens, which begins at 0 again after a resume."""
        self._metrics["train"].pop("num_tokens", None)
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No README.md beside the checkpoints."""

    def _send_telemetry(self) -> None:
        pass
