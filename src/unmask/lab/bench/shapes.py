"""The dimensions of well-known networks. This module imports no torch.

The cost of a step depends on these dimensions only. The weights are random: nothing is downloaded, and losses mean nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


@dataclass(frozen=True)
class Shape:
    """The dimensions of a network and the size of the batches that it is measured with.

    Attributes:
        name: The name, as reports show it.
        family: The kind of transformers config. Encoders get a classification head of two classes, and ``llama`` is a
            causal language model. ``config`` means that a config file decides.
        dims: The arguments of the config.
        batch: The default number of sequences per batch.
        length: The default number of tokens per sequence.
    """

    name: str
    family: Literal["roberta", "bert", "mpnet", "llama", "config"]
    dims: Mapping[str, int | float | bool] = field(hash=False)
    batch: int = 16
    length: int = 128


def _dims(*sizes: int, **more: int | float | bool) -> dict[str, int | float | bool]:
    return dict(zip(_SIZES, sizes, strict=True)) | more


def _llama(*sizes: int, kv: int, theta: float, tied: bool = True) -> dict[str, int | float | bool]:
    more = {"num_key_value_heads": kv, "tie_word_embeddings": tied, "rope_theta": theta, "rms_norm_eps": 1e-5}
    return _dims(*sizes, max_position_embeddings=4096, **more)


# BERT-like shapes by width and depth, from 11M to 957M weights, for the curve over the model's size.
SIZES: tuple[Shape, ...] = tuple(
    Shape(f"bert-{hidden}x{layers}", "bert", _dims(30522, hidden, layers, hidden // 64, 4 * hidden), 4, 128)
    for hidden, layers in ((256, 4), (512, 4), (512, 12), (768, 12), (1024, 24), (1280, 30), (1536, 32))
)

_ROBERTA = _dims(50265, 768, 12, 12, 3072, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1)
_LLAMA_7B = _llama(32000, 4096, 32, 32, 11008, kv=32, theta=1e4, tied=False)
SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("roberta-base", "roberta", _ROBERTA),
        Shape("minilm", "bert", _dims(30522, 384, 6, 12, 1536)),  # all-MiniLM-L6
        Shape("mpnet", "mpnet", _dims(30527, 768, 12, 12, 3072, max_position_embeddings=514)),  # all-mpnet-base
        Shape("smollm2", "llama", _llama(49152, 576, 30, 9, 1536, kv=3, theta=1e5), 4, 256),  # SmolLM2-135M
        Shape("llama-1b", "llama", _llama(128256, 2048, 16, 32, 8192, kv=8, theta=5e5), 1, 256),  # Llama-3.2-1B
        Shape("llama-7b", "llama", _LLAMA_7B, 4, 512),  # Llama-2-7B
        *SIZES,
    )
}
