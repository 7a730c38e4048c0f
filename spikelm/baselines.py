"""What a classifier must beat: the most frequent label, and a linear model on word counts."""

from collections import Counter
from collections.abc import Sequence

from spikelm.data.classification import Row
from spikelm.errors import SpikelmError


def majority(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Accuracy on `held_out` of the most frequent label of `train` (the smallest of several)."""
    _check(train, held_out)
    counts = Counter(row.label for row in train)
    label = min(counts, key=lambda label: (-counts[label], label))
    return sum(row.label == label for row in held_out) / len(held_out)


def bag_of_words(train: Sequence[Row], held_out: Sequence[Row]) -> float:
    """Accuracy on `held_out` of a logistic regression on the counts of words, lower case, of two characters and more.

    scikit-learn's CountVectorizer and LogisticRegression as they come [ours]; deterministic. SpikelmError without
    scikit-learn, with the command that installs it, and where `train` has one label or no such words.
    """
    try:
        from sklearn.feature_extraction.text import CountVectorizer  # type: ignore[import-untyped]
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
    except ImportError as error:
        raise SpikelmError(
            "bag_of_words needs scikit-learn, which is not installed: pip install 'spikelm[baselines]'"
        ) from error
    _check(train, held_out)
    labels = [row.label for row in train]
    if len(set(labels)) < 2:
        raise SpikelmError(f"bag_of_words needs rows of two labels at least; all {len(labels)} have {labels[0]}")
    vectorizer = CountVectorizer()
    try:
        words = vectorizer.fit_transform([row.text for row in train])
    except ValueError as error:  # "empty vocabulary"
        raise SpikelmError(f"bag_of_words finds no words in the {len(train)} rows to train on: {error}") from error
    model = LogisticRegression(max_iter=1000).fit(words, labels)
    texts = vectorizer.transform([row.text for row in held_out])
    return float(model.score(texts, [row.label for row in held_out]))


def _check(train: Sequence[Row], held_out: Sequence[Row]) -> None:
    for name, rows in (("train", train), ("held_out", held_out)):
        if not rows:
            raise SpikelmError(f"a baseline needs at least one row to train on and one held out; {name} is empty")
