"""A SpikingBert that starts from a BERT, and one whose weights are of another form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from spikelm.errors import SpikelmError
from spikelm.models.spikingbert.configuration_spikingbert import SpikingBertConfig
from spikelm.models.spikingbert.modeling_spikingbert import SpikingBertForSequenceClassification

# Of transformers' BertConfig, taken over.
SHARED = (
    *("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act", "max_position_embeddings"),
    *("type_vocab_size", "initializer_range", "layer_norm_eps", "pad_token_id", "id2label", "label2id"),
)
# Within a layer, BERT's name -> ours.
NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention_output",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "output.LayerNorm": "output_norm",
}


def from_bert(
    bert: PreTrainedModel, layers: Sequence[int] | None = None, **settings: Any
) -> SpikingBertForSequenceClassification:
    """A student with the parameters of a BERT: embeddings, chosen layers, and pooler and classifier where it has them.

    Args:
        bert: BertModel, BertForSequenceClassification or another transformers model of type "bert".
        layers: which of its layers, counted from 0; None is the last one of each of num_hidden_layers equal blocks.
        settings: of SpikingBertConfig, other than the shape, which is BERT's.

    Raises:
        SpikelmError: not a BERT, another shape asked for, layers that it does not have.
    """
    source = bert.config
    if source.model_type != "bert":
        raise SpikelmError(f"from_bert takes a model of type 'bert'; got {source.model_type!r}")
    shape = {name: getattr(source, name) for name in SHARED}
    if not hasattr(bert, "classifier"):  # the head is new: so may its classes be
        shape |= {name: settings[name] for name in ("id2label", "label2id") if name in settings}
    elif settings.get("num_labels", source.num_labels) != source.num_labels:
        raise SpikelmError(f"num_labels is the checkpoint's {source.num_labels}; got {settings['num_labels']}")
    for name in set(settings) & set(SHARED):
        if settings[name] != shape[name]:
            raise SpikelmError(f"{name} is the checkpoint's {shape[name]!r}; got {settings[name]!r}")
    count = len(layers) if layers is not None else settings.get("num_hidden_layers", source.num_hidden_layers)
    if settings.get("num_hidden_layers", count) != count:
        raise SpikelmError(f"num_hidden_layers {settings['num_hidden_layers']} does not go with {count} layers")
    chosen = block_ends(source.num_hidden_layers, count) if layers is None else list(layers)
    if any(not 0 <= layer < source.num_hidden_layers for layer in chosen):
        raise SpikelmError(f"layers must be within 0..{source.num_hidden_layers - 1}; got {chosen}")
    student = SpikingBertForSequenceClassification(
        SpikingBertConfig(**(shape | settings | {"num_hidden_layers": count}))
    )
    missing, unexpected = student.load_state_dict(_renamed(bert.state_dict(), chosen), strict=False)
    absent = [name for name in missing if not name.startswith(("bert.pooler.", "classifier.", "bert.feedback."))]
    if absent or unexpected:
        raise SpikelmError(f"the checkpoint does not fit: {', '.join((absent + unexpected)[:3])} ...")
    return student.to(bert.device, bert.dtype).train(bert.training)  # type: ignore[arg-type]


def block_ends(layers: int, blocks: int) -> list[int]:
    """The last layer of each of ``blocks`` equal blocks of a network of ``layers``, counted from 0."""
    if blocks < 1 or layers % blocks:
        raise SpikelmError(f"the checkpoint's {layers} layers must be a multiple of num_hidden_layers; got {blocks}")
    return [(block + 1) * layers // blocks - 1 for block in range(blocks)]


def with_weights(
    student: SpikingBertForSequenceClassification, weights: str, **settings: Any
) -> SpikingBertForSequenceClassification:
    """A copy with "binary" or "ternary" projections, whose masters are the student's weights. [ours]

    settings: further entries of SpikingBertConfig to change (``per_row``, ``T``, ...), none of the shape.
    """
    if student.config.packed:
        raise SpikelmError("a packed student has no float masters; take the training checkpoint")
    changes = {"weights": weights} | settings
    copy = SpikingBertForSequenceClassification(SpikingBertConfig.from_dict(student.config.to_dict() | changes))
    try:
        copy.load_state_dict(student.state_dict())
    except RuntimeError as error:
        raise SpikelmError(f"settings must leave the student's shape as it is; got {settings}: {error}") from error
    return copy.to(student.device, student.dtype).train(student.training)  # type: ignore[arg-type]


def _renamed(state: dict[str, torch.Tensor], chosen: Sequence[int]) -> dict[str, torch.Tensor]:
    """BERT's parameters by our names; other heads than a classifier's are left out."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("bert.")
        layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
        if layer:
            for index in (index for index, number in enumerate(chosen) if number == int(layer[1])):
                renamed[f"bert.layers.{index}.{NAMES[layer[2]]}.{layer[3]}"] = value
        elif name.startswith(("embeddings.", "pooler.")):
            renamed[f"bert.{name}"] = value
        elif name.startswith("classifier."):
            renamed[name] = value
    return renamed
