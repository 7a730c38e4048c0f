"""Preference pairs: rows {"prompt", "chosen", "rejected"}, read from files and the Hub, or made from plain text."""

import json
import logging
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spikelm.data.sources import LINES_SUFFIXES, hub_rows, line_rows, messages_of, plain_text
from spikelm.errors import SpikelmError
from spikelm.files import write_text

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Pair = dict[str, str]

PROGRESS_FROM_PAIRS = 2000
BATCH = 256  # pairs tokenised at a time

logger = logging.getLogger(__name__)


def load_preferences(
    source: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    context_length: int,
    *,
    held_out: float = 0.1,
    long_pairs: Literal["error", "drop"] = "error",
    append_eos: bool = True,
    seed: int = 0,
) -> "tuple[Dataset, Dataset]":
    """Read preference pairs; returns (train, held-out), rows {"prompt", "chosen", "rejected"} of text, as TRL takes.

    source: a path ending in .jsonl or .json (one object a line), or "hub:owner/name[:config[:split]]".
    A row holds chosen and rejected, both text (then with a text prompt) or both conversations (lists of messages);
    the prompt of conversations may be text, messages, or the beginning that they share. Conversations go through the
    tokenizer's chat template, or become lines "role: content" where it has none.
    context_length: the longest prompt with completion, in tokens, that training takes.
    held_out: fraction in (0, 1) of the distinct prompts, chosen by seed, so that no prompt is in both parts.
    long_pairs: what to do with longer ones: an error, or leave them out with a warning.
    append_eos: completions end with eos, as in TRL, unless a chat template made them; False for fragments of text such
        as make_preferences gives.
    SpikelmError names the source and the line of what cannot be used.
    """
    if not 0 < held_out < 1:
        raise SpikelmError(f"held_out is {held_out}; a fraction between 0 and 1 is accepted")
    if long_pairs not in ("error", "drop"):
        raise SpikelmError(f"long_pairs is {long_pairs!r}; error or drop is accepted")
    name = str(source)
    placed = {place: _pair(row, place, tokenizer, append_eos) for place, row in _numbered_rows(name)}
    if not placed:
        raise SpikelmError(f"{name} holds no pairs")
    pairs = _short_enough(placed, name, tokenizer, context_length, long_pairs)
    return _split(pairs, name, held_out, seed)


def tokenise_pairs(
    pairs: Iterable[Mapping[str, str]], tokenizer: "PreTrainedTokenizerBase", places: Sequence[str] | None = None
) -> "Dataset":
    """Rows {"prompt_ids", "chosen_ids", "rejected_ids"} of pairs of text; a bos comes first where there is one.

    prompt_ids + chosen_ids are the tokens of prompt + chosen; a completion begins where the tokens of one of the two
    part from those of the prompt alone, as in TRL. SpikelmError when completions have the same tokens, or none; it
    names the pair by `places`, without them by its number.
    """
    from datasets import Dataset
    from tqdm import tqdm

    rows = list(pairs)
    names = [f"pair {number}" for number in range(1, len(rows) + 1)] if places is None else places
    made: list[dict[str, list[int]]] = []
    silent = len(rows) < PROGRESS_FROM_PAIRS
    with tqdm(total=len(rows), unit="pair", desc="tokenising", disable=silent) as progress:
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            prompts = _encode([row["prompt"] for row in part], tokenizer)
            chosen = _encode([row["prompt"] + row["chosen"] for row in part], tokenizer)
            rejected = _encode([row["prompt"] + row["rejected"] for row in part], tokenizer)
            for place, prompt, good, bad in zip(names[start:], prompts, chosen, rejected, strict=False):
                if good == bad:
                    raise SpikelmError(f"{place}: chosen and rejected are the same tokens")
                common = len(commonprefix([prompt, good, bad]))
                if not prompt[:common]:
                    raise SpikelmError(f"{place}: the prompt shares no token with the completions it begins")
                if common in (len(good), len(bad)):
                    raise SpikelmError(f"{place}: a completion adds no token to its prompt")
                made.append({"prompt_ids": prompt[:common], "chosen_ids": good[common:], "rejected_ids": bad[common:]})
            progress.update(len(part))
    return Dataset.from_list(made)


def pair_lengths(tokens: Iterable[Mapping[str, list[int]]]) -> list[int]:
    """Tokens of the prompt and the longer completion of every row of tokenise_pairs."""
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in tokens]


def make_preferences(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    contexts: Iterable[Mapping[str, Any]],
    *,
    prompt_tokens: int,
    completion_tokens: int,
    temperature: float,
    batch_size: int,
    seed: int,
) -> list[Pair]:
    """Pairs from real text: the text goes on as it does (chosen), or as `model` makes it up (rejected). [ours]

    contexts: rows {"input_ids"} of one length, as load_contexts packs them, of at least prompt_tokens (a bos counts) +
        completion_tokens. A prompt is the first tokens of a context, chosen the next completion_tokens, rejected as
        many tokens sampled at `temperature` (> 0) from all that are text (no special ones, no parts of a character).
    Left out, and counted in a logged warning, are pairs whose true continuation holds a special token (another document
    begins there), whose texts are blank or the same, or whose text is not read as it was written or as more tokens.
    The same seed and batch_size give the same pairs; the global random state is left as it was.
    """
    import torch
    from tqdm import tqdm

    from spikelm.evaluate import batches, evaluation_mode

    _check_making(tokenizer, prompt_tokens, completion_tokens, temperature)
    rows = list(contexts)
    pairs: list[Pair] = []
    omitted: Counter[str] = Counter()
    unwritten = _not_text(tokenizer, model.config.vocab_size)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), evaluation_mode(model):
        torch.manual_seed(seed)
        for ids in tqdm(
            batches(rows, batch_size), total=math.ceil(len(rows) / max(1, batch_size)), desc="sampling", unit="batch"
        ):
            if ids.shape[1] < prompt_tokens + completion_tokens:
                raise SpikelmError(
                    f"contexts have {ids.shape[1]} tokens; prompt_tokens + completion_tokens = {prompt_tokens} + "
                    f"{completion_tokens} are needed"
                )
            true = ids[:, : prompt_tokens + completion_tokens]
            sampled = _continue(model, tokenizer, true[:, :prompt_tokens], completion_tokens, temperature, unwritten)
            for good, bad in zip(true.tolist(), sampled.tolist(), strict=True):
                pair = _text_pair(tokenizer, good, bad, prompt_tokens)
                if isinstance(pair, str):
                    omitted[pair] += 1
                else:
                    pairs.append(pair)
    if omitted:
        reasons = ", ".join(f"{count} {reason}" for reason, count in omitted.items())
        logger.warning("%d of %d contexts make no pair: %s", omitted.total(), len(rows), reasons)
    if not pairs:
        raise SpikelmError(f"none of the {len(rows)} contexts makes a pair")
    return pairs


def write_preferences(path: str | Path, pairs: Iterable[Mapping[str, str]]) -> None:
    """Write pairs as JSON Lines, whole or not at all."""
    write_text(Path(path), "".join(json.dumps(dict(pair)) + "\n" for pair in pairs))


def _numbered_rows(name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, row) of every row of a source."""
    accepted = f"a path ending in {' or '.join(LINES_SUFFIXES)}, or hub:owner/name"
    if name.startswith("hub:"):
        yield from ((f"{name} row {number}", row) for number, row in enumerate(hub_rows(name), 1))
        return
    path = Path(name)
    if path.suffix.lower() not in LINES_SUFFIXES or path.is_dir():
        raise SpikelmError(f"preference pairs cannot be read from {name or 'an empty name'}; accepted: {accepted}")
    if not path.exists():
        raise SpikelmError(f"no such preference pairs: {name}; accepted: {accepted}")
    yield from ((f"{name} line {number}", row) for number, row in line_rows(name))


def _pair(row: Mapping[str, Any], place: str, tokenizer: "PreTrainedTokenizerBase", append_eos: bool) -> Pair:
    """A row's three texts, as they are tokenised."""
    found = ", ".join(map(str, row)) or "none"
    for field in ("chosen", "rejected"):
        if field not in row:
            raise SpikelmError(f"{place} has no field {field!r}; its fields: {found}")
    kinds = {type(row["chosen"]), type(row["rejected"])}
    if kinds not in ({str}, {list}):
        names = " and ".join(type(row[field]).__name__ for field in ("chosen", "rejected"))
        raise SpikelmError(f"{place}: chosen and rejected are {names}; two texts or two lists of messages are accepted")
    if row["chosen"] == row["rejected"]:
        raise SpikelmError(f"{place}: chosen and rejected are the same")
    if kinds == {list}:
        pair, ended = _conversation_pair(row, place, tokenizer)
    elif not isinstance(row.get("prompt"), str):
        raise SpikelmError(f"{place}: a text prompt is needed beside a text; its fields: {found}")
    else:
        pair, ended = {field: row[field] for field in ("prompt", "chosen", "rejected")}, False
    for field, text in pair.items():
        if not text.strip():
            raise SpikelmError(f"{place}: {field} is empty")
    if append_eos and not ended:
        eos = tokenizer.eos_token
        if eos is None:
            raise SpikelmError("the tokenizer has no eos token to end completions with: set append_eos=False")
        pair |= {field: pair[field].removesuffix(eos) + eos for field in ("chosen", "rejected")}
    return pair


def _conversation_pair(row: Mapping[str, Any], place: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[Pair, bool]:
    """The texts of a row of conversations, and whether a chat template has ended the completions."""
    chosen, rejected = messages_of(row["chosen"]), messages_of(row["rejected"])
    given = row.get("prompt")
    prompt = messages_of(given) if isinstance(given, list) else None
    if isinstance(given, str) and given.strip():
        prompt = [{"role": "user", "content": given}]
    if not chosen or not rejected or (given is not None and not prompt):
        raise SpikelmError(f"{place}: a message needs a role and a content, both text, and a conversation a message")
    trl = require_trl("conversations")
    row = {"chosen": chosen, "rejected": rejected}
    shared = trl.extract_prompt(row)
    # A prompt that is given once more beside whole conversations, as many sets have it, is within what they share.
    whole = shared["prompt"] and (not prompt or any(prompt[-1] == message for message in shared["prompt"]))
    row = shared if whole else {"prompt": prompt, **row}
    if not row["prompt"]:
        raise SpikelmError(f"{place}: there is no prompt, and chosen and rejected share no first message")
    if tokenizer.chat_template is None:
        return _plain_pair(row, place), False
    from jinja2.exceptions import TemplateError

    try:
        return trl.apply_chat_template(row, tokenizer), True
    except TemplateError as error:
        raise SpikelmError(f"{place}: the tokenizer's chat template refuses it: {error}") from error


def _plain_pair(row: Mapping[str, Any], place: str) -> Pair:
    """Lines "role: content"; the prompt ends with the role that answers."""
    roles = {row[field][0]["role"] for field in ("chosen", "rejected")}
    if len(roles) > 1:
        raise SpikelmError(f"{place}: chosen and rejected begin with different roles: {', '.join(sorted(roles))}")
    prompt = f"{plain_text(row['prompt'])}\n{roles.pop()}:"
    texts = {field: plain_text([*row["prompt"], *row[field]]) for field in ("chosen", "rejected")}
    return {"prompt": prompt, **{field: text.removeprefix(prompt) for field, text in texts.items()}}


def _short_enough(
    placed: Mapping[str, Pair], name: str, tokenizer: "PreTrainedTokenizerBase", context_length: int, long_pairs: str
) -> list[Pair]:
    tokens = tokenise_pairs(placed.values(), tokenizer, list(placed))
    lengths = dict(zip(placed, pair_lengths(tokens), strict=True))
    kept = [pair for place, pair in placed.items() if lengths[place] <= context_length]
    omitted = len(placed) - len(kept)
    if not omitted:
        return kept
    longest = max(lengths, key=lambda place: lengths[place])
    message = (
        f"{name}: {omitted} of {len(placed)} pairs are longer than {context_length} tokens, up to {lengths[longest]} "
        f"({longest})"
    )
    if long_pairs == "error":
        raise SpikelmError(f"{message}: raise context_length, or leave them out with long_pairs=drop")
    if not kept:
        raise SpikelmError(f"{message}: nothing is left")
    warnings.warn(f"{message}: left out", stacklevel=3)
    return kept


def _split(pairs: list[Pair], name: str, held_out: float, seed: int) -> "tuple[Dataset, Dataset]":
    from datasets import Dataset

    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    if len(prompts) < 2:
        raise SpikelmError(
            f"{name} has pairs of a single prompt ({len(pairs)} in all): a second prompt is needed to hold it out"
        )
    random.Random(seed).shuffle(prompts)
    apart = set(prompts[: min(len(prompts) - 1, max(1, round(held_out * len(prompts))))])
    train = [pair for pair in pairs if pair["prompt"] not in apart]
    return Dataset.from_list(train), Dataset.from_list([pair for pair in pairs if pair["prompt"] in apart])


def _encode(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id  # a chat template may have written it already
    return [ids if bos is None or ids[:1] == [bos] else [bos, *ids] for ids in encoded]


def _check_making(
    tokenizer: "PreTrainedTokenizerBase", prompt_tokens: int, completion_tokens: int, temperature: float
) -> None:
    least = 1 if tokenizer.bos_token_id is None else 2
    if prompt_tokens < least:
        raise SpikelmError(f"prompt_tokens={prompt_tokens}: at least {least} is accepted, the bos among them")
    if completion_tokens < 1:
        raise SpikelmError(f"completion_tokens={completion_tokens}: at least 1 is accepted")
    if not temperature > 0:
        raise SpikelmError(f"temperature={temperature}: more than 0 is accepted")


def _not_text(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> list[int]:
    """Embeddings that are no text of their own: special tokens, parts of a character, and what is beyond the tokens."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    parts = (token for token, text in enumerate(texts) if "\ufffd" in text)
    return sorted({*tokenizer.all_special_ids, *parts, *range(len(tokenizer), vocab_size)})


def _continue(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "torch.Tensor",
    count: int,
    temperature: float,
    suppressed: list[int],
) -> "torch.Tensor":
    """prompts [B, P] with `count` sampled tokens behind them, [B, P + count]."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=count,
        suppress_tokens=suppressed or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    prompts = prompts.to(model.device)
    sequences: torch.Tensor = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), generation_config=settings
    )
    return sequences


def _text_pair(tokenizer: "PreTrainedTokenizerBase", good: list[int], bad: list[int], prompt_tokens: int) -> Pair | str:
    """The pair's texts, or why there is none."""
    if set(good[prompt_tokens:]) & set(tokenizer.all_special_ids):
        return "continue with a special token"
    first = 1 if good[0] == tokenizer.bos_token_id else 0
    prompt, chosen, rejected = (_decode(tokenizer, ids[first:]) for ids in (good[:prompt_tokens], good, bad))
    for text in (prompt, chosen, rejected):
        # Tokens that are half a character have no text, and a tokenizer may normalise what it reads.
        ids = _plain_ids(tokenizer, text)
        if "\ufffd" in text or not text.startswith(prompt) or _decode(tokenizer, ids) != text:
            return "do not survive decoding"
        if first + len(ids) > len(good):
            return "are more tokens when they are read again"
    pair = {"prompt": prompt, "chosen": chosen.removeprefix(prompt), "rejected": rejected.removeprefix(prompt)}
    if not all(text.strip() for text in pair.values()):
        return "are blank"
    return "have two equal continuations" if pair["chosen"] == pair["rejected"] else pair


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def require_trl(purpose: str) -> Any:
    """The module trl; SpikelmError with the install command where it is missing."""
    try:
        import trl
    except ImportError as error:
        raise SpikelmError(f"{purpose} need TRL ({error}): pip install 'spikelm[rl]' (see docs/install.md)") from error
    return trl
