"""How fast a causal language model decodes, as its user runs it: through generate, one sequence at a time."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from spikelm.errors import SpikelmError


class _Clock:
    """A streamer that notes when tokens come; the prompt is the first thing it is given."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decoding_speed(model: Any, prompt_ids: torch.Tensor, new_tokens: int = 64, repeats: int = 3) -> dict[str, float]:
    """Greedy decoding of a prompt [1, L], ``repeats`` times: seconds from the prompt to its first token, and per token.

    Returns {"prefill_s", "seconds_per_token", "tokens_per_second"}: medians, over the repeats and over all tokens after
    the first one of each; a first, unmeasured run builds what has to be built.

    Raises:
        SpikelmError: a prompt of another shape, or fewer than two new tokens.
    """
    if prompt_ids.dim() != 2 or len(prompt_ids) != 1 or not prompt_ids.shape[1]:
        raise SpikelmError(f"prompt_ids must be [1, L] with L >= 1; got {tuple(prompt_ids.shape)}")
    if new_tokens < 2 or repeats < 1:
        raise SpikelmError(f"new_tokens must be >= 2 and repeats >= 1; got {new_tokens} and {repeats}")
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
    first, gaps = [], []
    for repeat in range(repeats + 1):
        clock = _Clock(prompt_ids.device)
        ids = prompt_ids
        model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **settings)
        if repeat:
            _, prompt, *tokens = clock.times
            first.append(tokens[0] - prompt)
            gaps += [after - before for before, after in zip(tokens, tokens[1:], strict=False)]
    seconds = statistics.median(gaps)
    return {
        "prefill_s": statistics.median(first),
        "seconds_per_token": seconds,
        "tokens_per_second": 1 / seconds,
    }


def tokens_per_second(model: Any, prompt_ids: torch.Tensor, new_tokens: int = 64) -> float:
    """That of :func:`decoding_speed`."""
    return decoding_speed(model, prompt_ids, new_tokens)["tokens_per_second"]
