"""What every Python carries: its English documentation; a tokenizer and a small teacher trained on it on the spot."""

import ast
import inspect
import itertools
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.text import text_contexts
from spikelm.distributed import on_first_rank
from spikelm.errors import SpikelmError
from spikelm.files import put_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# encodings and __phello__ hold generated text, idlelib, lib2to3 and turtledemo code that is not the library's.
LEFT_OUT = {"idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip", "pydoc_data", "__phello__"}
TEST_FOLDERS = {"test", "tests", "idle_test"}
# Later Pythons write their topics with these signs; everything else outside ASCII drops its paragraph.
TYPOGRAPHIC = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u2022": "*",
    }
)

# What train_teacher can train, and the shape it has unless told otherwise. [ours]
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 176,
        "initializer_range": 0.06,  # learns faster than 0.02 at this width
    },
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "state_size": 16,
        "head_dim": 16,
        "expand": 2,
        "n_groups": 1,
        "chunk_size": 32,
        "initializer_range": 0.06,
    },
}


@lru_cache(maxsize=1)
def python_documentation(max_bytes: int | None = None) -> str:
    """The reference of pydoc_data.topics, then the docstrings of the standard library by file name: 2 MB of ASCII.

    Paragraphs that are not ASCII are left out, and those that came before. The same Python gives the same text.
    max_bytes: cut there, between paragraphs.
    """
    paragraphs: dict[str, None] = {}
    size = 0
    for document in itertools.chain(_topics(), (text for _, text in docstrings())):
        for paragraph in document_paragraphs(document):
            if not paragraph.isascii() or "\0" in paragraph or paragraph in paragraphs:
                continue
            size += len(paragraph) + 2
            if max_bytes is not None and size > max_bytes:
                return _joined(paragraphs)
            paragraphs[paragraph] = None
    return _joined(paragraphs)


def document_paragraphs(document: str) -> list[str]:
    """Paragraphs without blanks at line ends and without rulers (lines that hold neither letters nor digits)."""
    lines = (line.rstrip() for line in document.translate(TYPOGRAPHIC).split("\n"))
    kept = (line for line in lines if not line or any(map(str.isalnum, line)))
    return [paragraph for part in "\n".join(kept).split("\n\n") if (paragraph := part.strip("\n"))]


def _joined(paragraphs: dict[str, None]) -> str:
    if not paragraphs:
        raise SpikelmError(
            "this Python carries no documentation (or max_bytes is too small); give a text file as data instead"
        )
    return "\n\n".join(paragraphs) + "\n\n"


def _topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SpikelmError("this Python carries no pydoc_data.topics; give a text file as data instead") from error
    return [topics[name] for name in sorted(topics)]


def docstrings() -> Iterator[tuple[str, str]]:
    """(top-level package or module, docstring) of the standard library, by file name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        parts = path.relative_to(root).parts
        package = parts[0].removesuffix(".py")
        if package not in sys.stdlib_module_names or package in LEFT_OUT or TEST_FOLDERS.intersection(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own sources are not the reader's concern
            module = ast.parse(path.read_bytes())
        yield from ((package, text) for text in _own_docstrings(module))


def _own_docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """Docstrings in the order of the file. Statements only are walked, which is five times faster than ast.walk."""
    text = ast.get_docstring(node, clean=False)
    if text:
        yield inspect.cleandoc(text)
    waiting: list[ast.AST] = list(reversed(node.body))
    while waiting:
        statement = waiting.pop()
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _own_docstrings(statement)
        else:
            for field in ("finalbody", "orelse", "handlers", "body"):
                inner = getattr(statement, field, [])
                waiting.extend(reversed(inner) if isinstance(inner, list) else [])


def train_tokenizer(text: str, vocab_size: int = 512, *, model_max_length: int = 512) -> "PreTrainedTokenizerFast":
    """Byte-level BPE with bos <s>, eos and pad </s>; decode(encode(x)) == x for every text x (no bos is added)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 258  # 256 bytes and the two specials
    if vocab_size < smallest:
        raise SpikelmError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def train_teacher(
    output_dir: str | Path,
    text: str,
    *,
    model_type: str = "llama",
    vocab_size: int = 512,
    context_length: int = 128,
    max_tokens: int | None = None,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 6e-3,
    held_out: float = 0.05,
    seed: int = 0,
    **shape: int | float,
) -> Path:
    """Train a tokenizer and a model with tied embeddings on `text`; returns the directory, which appears when whole.

    The last `held_out` of the contexts is not trained on: the part that load_contexts holds out of the same text at
    the same context length and max_tokens.
    A directory that exists and is not empty is refused; an interrupted training goes on from its last checkpoint in
    "<output_dir>.training" when it is called again.

    Args:
        model_type: "llama" (LlamaForCausalLM) or "mamba2" (Mamba2ForCausalLM).
        shape: entries of the model's configuration, those that TEACHERS[model_type] names.
    """
    from torch import nn
    from transformers import AutoModelForCausalLM, set_seed

    from spikelm.distill.objectives import NextToken
    from spikelm.distill.trainer import train

    target = Path(output_dir)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SpikelmError(f"{target} exists already; give train_teacher a directory that does not exist or is empty")
    _check_shape(model_type, shape)
    tokenizer = train_tokenizer(text, vocab_size, model_max_length=context_length)
    contexts, _ = text_contexts(text, tokenizer, context_length, held_out, max_tokens)
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(_teacher_config(model_type, shape, tokenizer, context_length))
    training, partial = (target.with_name(target.name + suffix) for suffix in (".training", ".partial"))
    train(
        model,
        nn.Identity(),  # nobody teaches it
        contexts,
        NextToken(),
        output_dir=training,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_fraction=0.08,
        save_steps=200,
        seed=seed,
    )

    def keep() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        model.eval().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        shutil.copy(training / "log.jsonl", partial)
        put_in_place(partial, target, record={"steps": steps})
        shutil.rmtree(training)

    on_first_rank(keep)
    return target


def _check_shape(model_type: str, shape: dict[str, int | float]) -> None:
    if model_type not in TEACHERS:
        raise SpikelmError(f"model_type must be one of {', '.join(TEACHERS)}; got {model_type!r}")
    unknown = [name for name in shape if name not in TEACHERS[model_type]]
    if unknown:
        raise SpikelmError(f"a {model_type} teacher takes {', '.join(TEACHERS[model_type])}; got {', '.join(unknown)}")


def _teacher_config(
    model_type: str, shape: dict[str, int | float], tokenizer: "PreTrainedTokenizerFast", context_length: int
) -> Any:
    from transformers import AutoConfig

    settings = TEACHERS[model_type] | shape
    if model_type == "llama":
        settings |= {"max_position_embeddings": context_length}
    else:
        settings |= {"num_heads": settings["expand"] * settings["hidden_size"] // settings["head_dim"]}
    return AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,  # pad is eos; its embedding must be trained
        **settings,
    )
