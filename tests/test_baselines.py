"""The baselines on rows whose answer is known."""

import sys

import pytest

from spikelm.baselines import bag_of_words, majority
from spikelm.data import Row, embedded_classification, hold_out_sentences
from spikelm.errors import SpikelmError

TRAIN = [Row("a fine film", 1), Row("a dull film", 0), Row("fine and warm", 1), Row("dull and cold", 0)]


def test_majority_takes_the_most_frequent_label_of_the_training_rows() -> None:
    held_out = [Row("x", 0), Row("y", 1), Row("z", 1)]
    assert majority([*TRAIN, Row("warm", 1)], held_out) == pytest.approx(2 / 3)
    assert majority(TRAIN, held_out) == pytest.approx(1 / 3), "the smaller label of two that are as frequent"


def test_bag_of_words_learns_words_and_meets_new_ones() -> None:
    assert bag_of_words(TRAIN, [Row("FINE evening", 1), Row("dull evening", 0)]) == 1
    assert bag_of_words(TRAIN, [Row("fine evening", 0), Row("dull evening", 0)]) == 0.5


def test_the_embedded_rows_are_learnable_and_not_trivial() -> None:
    train, held_out = hold_out_sentences(embedded_classification()[0], 1000, seed=0)
    assert majority(train, held_out) < 0.5
    accuracy = bag_of_words(train, held_out)
    assert 0.8 < accuracy < 0.95
    assert bag_of_words(train, held_out) == accuracy


def test_rows_that_give_no_baseline() -> None:
    for function in (majority, bag_of_words):
        with pytest.raises(SpikelmError, match="train is empty"):
            function([], TRAIN)
        with pytest.raises(SpikelmError, match="held_out is empty"):
            function(TRAIN, [])
    with pytest.raises(SpikelmError, match="rows of two labels at least; all 1 have 1"):
        bag_of_words(TRAIN[:1], TRAIN)
    with pytest.raises(SpikelmError, match="no words in the 2 rows"):
        bag_of_words([Row("?", 0), Row("!", 1)], TRAIN)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(SpikelmError, match=r"needs scikit-learn.*pip install 'spikelm\[baselines\]'"):
        bag_of_words(TRAIN, TRAIN)
    assert majority(TRAIN, TRAIN) == 0.5
