"""decoding_speed: the time between the tokens that generate gives out."""

import time
from typing import Any

import pytest
import torch

from spikelm.errors import SpikelmError
from spikelm.evaluate_decoding import decoding_speed, tokens_per_second


class Slow:
    """A model that needs 20 ms for a prompt and 5 ms for every token."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def generate(self, ids: torch.Tensor, streamer: Any, **settings: Any) -> None:
        self.calls.append(settings)
        streamer.put(ids)
        time.sleep(0.015)
        for token in range(settings["max_new_tokens"]):
            time.sleep(0.005)
            streamer.put(torch.tensor([token]))
        streamer.end()


def test_it_measures_tokens_and_the_prompt() -> None:
    model = Slow()
    speed = decoding_speed(model, torch.ones(1, 3, dtype=torch.long), new_tokens=5, repeats=2)
    assert 0.005 <= speed["seconds_per_token"] < 0.015
    assert speed["tokens_per_second"] == 1 / speed["seconds_per_token"]
    assert 0.02 <= speed["prefill_s"] < 0.04
    assert len(model.calls) == 3  # the first builds what has to be built
    assert all(call["min_new_tokens"] == 5 and not call["do_sample"] for call in model.calls)
    assert 60 < tokens_per_second(model, torch.ones(1, 3, dtype=torch.long), 4) <= 200


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {}, r"prompt_ids must be \[1, L\] with L >= 1; got \(2, 3\)"),
        ((1, 0), {}, r"prompt_ids must be \[1, L\] with L >= 1; got \(1, 0\)"),
        ((1, 3), {"new_tokens": 1}, "new_tokens must be >= 2 and repeats >= 1; got 1 and 3"),
        ((1, 3), {"repeats": 0}, "new_tokens must be >= 2 and repeats >= 1; got 64 and 0"),
    ],
)
def test_what_it_refuses(shape: tuple[int, int], options: dict[str, int], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        decoding_speed(Slow(), torch.ones(shape, dtype=torch.long), **options)
