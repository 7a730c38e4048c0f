"""Text packed to contexts of one length: rows {"input_ids": [context_length ids]}, bos first where there is one."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from spikelm.data.bad_documents import BadDocuments, document_error
from spikelm.data.sources import (
    BLOCK_BYTES,
    Piece,
    Reading,
    read_pieces,
    source_names,
    text_blocks,
    total_bytes,
)
from spikelm.errors import SpikelmError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

PROGRESS_FROM_BYTES = 5_000_000
STREAMING_HELD_OUT = 256  # contexts, when no max_tokens says what a fraction is a fraction of


def load_contexts(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    *,
    held_out: float = 0.05,
    text_field: str | None = None,
    streaming: bool = False,
    max_tokens: int | None = None,
    split: str = "train",
    hub_config: str | None = None,
    max_bad_documents: int = 10,
    bad_documents: list[dict[str, Any]] | None = None,
) -> "tuple[Dataset | IterableDataset, Dataset]":
    """Read, tokenise and pack `source`; returns (train, held-out), rows {"input_ids": [context_length ints]}.

    source: a path ending in .txt or .md (one stream of text), .jsonl or .json (one object a line), "embedded"
        (spikelm.data.embedded), "hub:owner/name[:config[:split]]", or several of these joined with "+", from which
        rows (or blocks of 1 MB of a text) are taken in turn.
    held_out: fraction in (0, 1) of the contexts, the last ones. With streaming=True, where the end is not known, the
        first ones: the fraction of max_tokens, or 256 contexts without max_tokens.
    text_field: the field of a row; without it the first of text, content, story, prompt + response, instruction +
        output, conversations, messages. Conversations go through the tokenizer's chat template, or become lines
        "role: content" where it has none.
    streaming: train is an IterableDataset that reads its source again on every pass; nothing but a block is in memory.
    max_tokens: at most this many tokens are kept, held-out ones included.
    split, hub_config: of a Hub dataset that does not name its own.
    max_bad_documents: so many documents of all sources together may be bad and are left out, with one warning that
        counts them and names the first ones; with streaming, on every pass, with a warning for each as it is met. Bad
        is a line that is no JSON object or not UTF-8, or a document on which the tokenizer or its chat template fails.
        One more is an error, and with 0 the first one is.
    bad_documents: a list that gets {"source", "line" or "row" (counted from 1), "reason"} of each that was left out;
        nothing with streaming, where most are met later.
    A context is [bos] + context_length - 1 tokens of text, or context_length tokens for a tokenizer without bos
    [ours]. Documents are joined by eos where there is one; the tokenizer adds nothing of its own; what is left after
    the last whole context is dropped. Rows without text are skipped with a warning. SpikelmError names what cannot be
    read.
    """
    _check_numbers(context_length, held_out, max_tokens)
    if not (isinstance(max_bad_documents, int) and max_bad_documents >= 0):
        raise SpikelmError(f"max_bad_documents is {max_bad_documents}; a whole number >= 0 is accepted")
    names = source_names(source)
    reading = Reading(tokenizer, text_field, split, hub_config, streaming, max_bad_documents)
    limit = None if max_tokens is None else max_tokens // context_length
    if streaming:
        count = STREAMING_HELD_OUT if limit is None else min(limit - 1, max(1, round(held_out * limit)))
        return _streamed(names, reading, context_length, limit, count)
    size = total_bytes(names)
    silent = 0 < size <= PROGRESS_FROM_BYTES or names == ["embedded"]
    bad = BadDocuments(names, max_bad_documents)
    with tqdm(total=size or None, unit="B", unit_scale=True, desc="tokenising", disable=silent) as progress:
        pieces = _counted(read_pieces(names, reading, bad), progress)
        blocks = list(pack(pieces, tokenizer, context_length, limit, bad))
    bad.warn()
    if bad_documents is not None:
        bad_documents.extend(bad.found)
    return _split(blocks, str(source), context_length, held_out)


def text_contexts(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    held_out: float = 0.05,
    max_tokens: int | None = None,
) -> "tuple[Dataset, Dataset]":
    """Pack a text in memory (python_documentation() as load_contexts packs "embedded"); returns (train, held-out)."""
    _check_numbers(context_length, held_out, max_tokens)
    limit = None if max_tokens is None else max_tokens // context_length
    pieces = (Piece(0, 0, block) for block in text_blocks(text))
    return _split(list(pack(pieces, tokenizer, context_length, limit)), "the text", context_length, held_out)


def bytes_per_token(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase") -> float:
    """UTF-8 bytes per token of text, a leading bos not counted: bits per byte = cross entropy in nats / ln 2 / this.

    An eos between documents is a token that is predicted and has no bytes.
    """
    text_bytes = text_tokens = 0
    for start in range(0, len(dataset), 1000):
        rows = dataset[start : start + 1000]["input_ids"]
        # One stream, not row by row: a context may begin within a character, and some decoders strip the first blank.
        tokens = [token for row in rows for token in row[row[0] == tokenizer.bos_token_id :]]
        text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text_bytes += len(str(text).encode())
        text_tokens += len(tokens)
    if not text_bytes:
        raise SpikelmError(f"bytes_per_token: the {len(dataset)} contexts given hold no text")
    return text_bytes / text_tokens


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """SpikelmError when the tokenizer has more tokens than the model has embeddings; fewer is usual (padding)."""
    if len(tokenizer) > vocab_size:
        raise SpikelmError(
            f"the tokenizer has {len(tokenizer)} tokens and the model a vocabulary of {vocab_size}: they disagree"
        )


def pack(
    pieces: Iterable[Piece],
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    limit: int | None = None,
    bad: BadDocuments | None = None,
) -> Iterator[np.ndarray]:
    """Tokenise pieces; yields int32 arrays [n, context_length] of whole contexts, `limit` in all; memory is bounded.

    bad: where documents are noted on which the tokenizer fails; without it the first one is a SpikelmError.
    """
    bad = BadDocuments(["the text"]) if bad is None else bad
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    body = context_length - len(bos)
    rest = np.empty(0, dtype=np.int32)
    made = 0
    for tokens in _token_runs(pieces, tokenizer, bad):
        rest = np.concatenate([rest, tokens])
        count = len(rest) // body if limit is None else min(len(rest) // body, limit - made)
        block = np.empty((count, context_length), dtype=np.int32)
        block[:, : len(bos)] = bos
        block[:, len(bos) :] = rest[: count * body].reshape(count, body)
        rest = rest[count * body :]
        made += count
        if count:
            yield block
        if made == limit:
            return


def _token_runs(
    pieces: Iterable[Piece], tokenizer: "PreTrainedTokenizerBase", bad: BadDocuments
) -> Iterator[np.ndarray]:
    """Token ids [n] of about 1 MB of text at a time, eos between documents."""
    previous: tuple[int, int] | None = None
    for together in _batches(pieces):
        runs: list[Any] = []
        for piece, tokens in _tokenised(together, tokenizer, bad):
            if previous is not None and previous != piece[:2] and tokenizer.eos_token_id is not None:
                runs.append([tokenizer.eos_token_id])
            runs.append(tokens)
            previous = piece[:2]
        if runs:
            yield np.concatenate([np.asarray(run, dtype=np.int32) for run in runs])


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that together are about 1 MB of text."""
    waiting: list[Piece] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece.text)
        if size >= BLOCK_BYTES:
            yield waiting
            waiting, size = [], 0
    if waiting:
        yield waiting


def _tokenised(
    pieces: list[Piece], tokenizer: "PreTrainedTokenizerBase", bad: BadDocuments
) -> list[tuple[Piece, list[int]]]:
    """The pieces with their token ids, without the documents on which the tokenizer fails."""
    texts = [piece.text for piece in pieces]
    try:
        # verbose=False: the stream is meant to be longer than the model's context.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return list(zip(pieces, encoded["input_ids"], strict=True))
    except BaseException as error:
        fault = document_error("the tokenizer", error)
        if len(pieces) == 1:
            fault.__cause__ = error
            bad.add(pieces[0].source, pieces[0].document, fault)
            return []
    # It does not say which of them it was.
    half = len(pieces) // 2
    return _tokenised(pieces[:half], tokenizer, bad) + _tokenised(pieces[half:], tokenizer, bad)


def _counted(pieces: Iterator[Piece], progress: "tqdm[Any]") -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        # surrogatepass: JSON may escape half of a pair, on which the tokenizer has yet to fail.
        progress.update(len(piece.text.encode(errors="surrogatepass")))


def _check_numbers(context_length: int, held_out: float, max_tokens: int | None) -> None:
    if context_length < 2:
        raise SpikelmError(f"context_length is {context_length}; at least 2 tokens are needed to predict one")
    if not 0 < held_out < 1:
        raise SpikelmError(f"held_out is {held_out}; a fraction between 0 and 1 is accepted")
    if max_tokens is not None and max_tokens < 2 * context_length:
        raise SpikelmError(
            f"max_tokens is {max_tokens}; at least two contexts ({2 * context_length} tokens) are needed"
        )


def _dataset(contexts: np.ndarray) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32"), length=contexts.shape[1])})
    return Dataset.from_dict({"input_ids": contexts}, features=features)


def _split(blocks: list[np.ndarray], source: str, context_length: int, held_out: float) -> "tuple[Dataset, Dataset]":
    count = sum(map(len, blocks))
    if count < 2:
        raise _too_short(source, count, 2, context_length)
    contexts = np.concatenate(blocks)
    kept = count - min(count - 1, max(1, round(held_out * count)))
    return _dataset(contexts[:kept]), _dataset(contexts[kept:])


def _streamed(
    names: list[str], reading: Reading, context_length: int, limit: int | None, held_out: int
) -> "tuple[IterableDataset, Dataset]":
    from datasets import Features, IterableDataset, List, Value

    # One context more than is held out: a source without a train context is refused here, not at the first step.
    blocks = list(_streamed_blocks(names, reading, context_length, held_out + 1))
    count = sum(map(len, blocks))
    if count <= held_out:
        raise _too_short("+".join(names), count, held_out + 1, context_length)
    train = IterableDataset.from_generator(
        _stream_rows,
        features=Features({"input_ids": List(Value("int32"), length=context_length)}),
        gen_kwargs={
            "names": names,
            "reading": reading,
            "context_length": context_length,
            "limit": limit,
            "skip": held_out,
        },
    )
    return train, _dataset(np.concatenate(blocks)[:held_out])


def _streamed_blocks(
    names: list[str], reading: Reading, context_length: int, limit: int | None
) -> Iterator[np.ndarray]:
    """One pass. Every pass, on every rank, leaves out the same documents."""
    bad = BadDocuments(names, reading.max_bad_documents, at_once=True)
    return pack(read_pieces(names, reading, bad), reading.tokenizer, context_length, limit, bad)


def _stream_rows(
    names: list[str], reading: Reading, context_length: int, limit: int | None, skip: int
) -> Iterator[dict[str, list[int]]]:
    for block in _streamed_blocks(names, reading, context_length, limit):
        for context in block[skip:]:
            yield {"input_ids": context.tolist()}
        skip = max(0, skip - len(block))


def _too_short(source: str, found: int, needed: int, context_length: int) -> SpikelmError:
    return SpikelmError(
        f"{source} is too short: it fills {found} contexts of {context_length} tokens, {needed} are needed"
    )
