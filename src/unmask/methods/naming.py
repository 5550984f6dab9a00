"""Reads from a tensor's name its layer and the kind of its module.

The names of BERT, RoBERTa, MPNet, DeBERTa, DistilBERT, ModernBERT, T5, BART, OPT, Llama and GPT-2 are known, and those of models
that descend from them. Everything else is ``"other"``, so that counts by kind add up: embeddings, normalisations, heads, and
projections that hold queries, keys and values in another order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

KINDS = ("key", "query", "value", "attention output", "ffn1", "ffn2")
OTHER = "other"

_LAYER = re.compile(r"\.(?:layer|layers|h|block|blocks)\.(\d+)\.")
_OF_KIND = (
    ("key", re.compile(r"\.(?:key|key_proj|k_proj|k_lin|k)\.")),
    ("query", re.compile(r"\.(?:query|query_proj|q_proj|q_lin|q)\.")),
    ("value", re.compile(r"\.(?:value|value_proj|v_proj|v_lin|v)\.")),
    (
        "attention output",
        re.compile(r"[Aa]tt\w*\.(?:o_proj|out_proj|out_lin|o|Wo|c_proj|dense|output\.dense|attn\.o)\."),
    ),
    (
        "ffn1",
        re.compile(r"\.(?:intermediate\.dense|gate_proj|up_proj|gate_up_proj|c_fc|fc1|lin1|wi|wi_\d|mlp\.Wi|w1|w3)\."),
    ),
    ("ffn2", re.compile(r"\.(?:output\.dense|down_proj|mlp\.c_proj|fc2|lin2|wo|mlp\.Wo|w2)\.")),
)
_FUSED = re.compile(r"\.attn\.c_attn\.(?:base_layer\.)?(?:weight|bias)$")
_THREE = ("query", "key", "value")


def layer_of(name: str) -> str | None:
    """Returns the number of the layer that a tensor belongs to, as text; None outside the layers.

    Example:
        >>> layer_of("bert.encoder.layer.11.output.dense.weight"), layer_of("bert.pooler.dense.weight")
        ('11', None)
    """
    match = _LAYER.search(f".{name}")
    return match.group(1) if match else None


def without_layer(name: str) -> str:
    """Returns a tensor's name after its layer's number; the whole name outside the layers.

    Example:
        >>> without_layer("encoder.layer.3.attention.self.query.weight")
        'attention.self.query.weight'
    """
    match = _LAYER.search(f".{name}")
    return f".{name}"[match.end() :] if match else name


def kind_of(name: str) -> str:
    """Returns the kind of a tensor's module: one of `KINDS`, or ``"other"``.

    Example:
        >>> kind_of("model.layers.0.mlp.down_proj.weight"), kind_of("model.embed_tokens.weight")
        ('ffn2', 'other')
    """
    if layer_of(name) is None:
        return OTHER
    rest = f".{without_layer(name)}"
    return next((kind for kind, pattern in _OF_KIND if pattern.search(rest)), OTHER)


def kinds_of(name: str, shape: Sequence[int], weight: Sequence[int] | None = None) -> tuple[str, ...]:
    """Returns the kinds of equal parts along a tensor's last dimension: one, or GPT-2's query, key and value in one tensor.

    Args:
        name: The tensor's name.
        shape: The tensor's shape.
        weight: The shape of the weight that a bias belongs to, where it is known.

    Example:
        >>> kinds_of("transformer.h.0.attn.c_attn.weight", (4, 12))
        ('query', 'key', 'value')
        >>> kinds_of("transformer.h.0.attn.c_attn.weight", (12, 4))
        ('other',)
    """
    if not _FUSED.search(f".{name}") or layer_of(name) is None:
        return (kind_of(name),)
    matrix = shape if len(shape) == 2 else weight or (shape[-1] // 3, shape[-1])
    three = len(matrix) == 2 and matrix[1] == 3 * matrix[0]  # otherwise it is a linear layer with another order
    return _THREE if three else (OTHER,)


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Returns a label for each tensor's layer: its number, or ``"other"``; with the stack's name where there are several stacks.

    Example:
        >>> layer_labels(["encoder.block.0.a.weight", "decoder.block.0.a.weight", "shared.weight"])
        {'encoder.block.0.a.weight': 'encoder 0', 'decoder.block.0.a.weight': 'decoder 0', 'shared.weight': 'other'}
    """
    found = {name: _LAYER.search(f".{name}") for name in names}
    # The stack is the last piece of the path before ``layer.N``.
    stacks = {name: f".{name}"[: match.start()].rpartition(".")[2] for name, match in found.items() if match}
    several = len(set(stacks.values())) > 1
    labels = {}
    for name, match in found.items():
        number = match[1] if match else OTHER
        labels[name] = f"{stacks[name]} {number}" if several and stacks.get(name) else number
    return labels
