"""Load a teacher: any causal LM with its tokenizer, from a directory or the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spikelm.data.text import check_tokenizer
from spikelm.errors import SpikelmError
from spikelm.limits import check_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_teacher(
    path_or_hub_id: str | Path, role: str = "teacher"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model, tokenizer); the model in float32, eval mode and frozen.

    SpikelmError, naming the role, when nothing is found, the model is no causal LM, weights are missing, there is no
    tokenizer, or the tokenizer has more tokens than the model.
    """
    from transformers import AutoModelForCausalLM

    name = str(path_or_hub_id)
    _check_causal(name, role)
    model = load_whole(AutoModelForCausalLM, name, role)
    tokenizer = _load_tokenizer(name, role)
    try:
        check_tokenizer(tokenizer, model.config.vocab_size)
    except SpikelmError as error:
        raise SpikelmError(f"{role} {name}: {error}") from error
    return model.eval().requires_grad_(False), tokenizer


def load_whole(model_class: Any, path_or_hub_id: str, role: str) -> "PreTrainedModel":
    """model_class.from_pretrained in float32; SpikelmError, naming the `role`, unless every weight is there."""
    import torch

    check_directory(path_or_hub_id, role)
    try:
        loaded: Any = model_class.from_pretrained(
            path_or_hub_id, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # damaged weights raise the classes of several libraries; the cause stays chained
        raise SpikelmError(f"{role} {path_or_hub_id}: its weights cannot be loaded: {_reason(error)}") from error
    model, loading = loaded
    if any(name.endswith(".neuron.a") for name in loading["unexpected_keys"]):
        raise SpikelmError(
            f"{role} {path_or_hub_id} has a spiking model's weights, but its config.json holds no recipe"
        )
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise SpikelmError(f"{role} {path_or_hub_id} lacks {len(missing)} of its weights, {missing[0]} among them")
    return model


def _check_causal(name: str, role: str) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise SpikelmError(f"{role} {name} holds no config.json; a directory written by save_pretrained is accepted")
    check_directory(name, role)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # files, network and configuration classes; the cause stays chained
        raise SpikelmError(
            f"{role} {name} is not found, neither as a directory nor on the Hub: {_reason(error)}"
        ) from error
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    architectures = config.architectures or []
    # A masked LM would load as a causal one with its weights: its own words decide, and without any the Auto class.
    if architectures and not any(given in known or given.endswith("ForCausalLM") for given in architectures):
        raise SpikelmError(f"{role} {name} is a {', '.join(architectures)}; a causal LM is accepted")


def _load_tokenizer(name: str, role: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way; the cause stays chained
        raise SpikelmError(f"{role} {name} has no tokenizer that can be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
