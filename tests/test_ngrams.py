"""N-gram models against counting by hand."""

import math

import pytest

from spikelm.errors import SpikelmError
from spikelm.ngrams import ngram_cross_entropies

TRAIN = [{"input_ids": [0, 1, 1, 2]}, {"input_ids": [0, 1, 2, 2]}]


def test_are_counted_by_hand() -> None:
    found = ngram_cross_entropies(TRAIN, [{"input_ids": [0, 1, 2]}, {"input_ids": [2, 0, 1]}], 3, smoothing=0.5)
    unigram = [1 / 9, 4 / 9, 4 / 9]  # 0, 3 and 3 seen, and 1 each
    assert found["unigram"] == pytest.approx(-sum(math.log(unigram[i]) for i in (1, 2, 0, 1)) / 4)
    rows = {0: (0, 2, 0), 1: (0, 1, 2), 2: (0, 0, 1)}
    bigram = {
        (i, j): (count + 1.5 * unigram[j]) / (sum(row) + 1.5) for i, row in rows.items() for j, count in enumerate(row)
    }
    expected = -sum(math.log(bigram[pair]) for pair in ((0, 1), (1, 2), (2, 0), (0, 1))) / 4
    assert found["bigram"] == pytest.approx(expected)


def test_tokens_never_seen_cost_something_finite() -> None:
    found = ngram_cross_entropies(TRAIN, [{"input_ids": [7, 8, 9]}], 10)
    assert all(math.isfinite(value) and value > math.log(10) for value in found.values())


def test_a_chain_is_predicted_by_the_bigram_alone() -> None:
    rows = [{"input_ids": [i % 5 for i in range(start, start + 50)]} for start in range(5)]
    found = ngram_cross_entropies(rows, rows, 5)
    assert found["unigram"] == pytest.approx(math.log(5), rel=1e-3) and found["bigram"] < 0.02


def test_refuses_no_text_and_no_smoothing() -> None:
    with pytest.raises(SpikelmError, match="smoothing must be > 0; got 0"):
        ngram_cross_entropies(TRAIN, TRAIN, 3, smoothing=0)
    with pytest.raises(SpikelmError, match="no context"):
        ngram_cross_entropies(TRAIN, [], 3)
