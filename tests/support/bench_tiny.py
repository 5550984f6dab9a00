"""Makes a model of a few thousand weights to run the benchmark on."""

from __future__ import annotations

from models import SIZES
from transformers import BertConfig

from unmask.lab.bench.settings import BenchSettings

BUDGET = 200
DIMS = {"vocab_size": 60, "max_position_embeddings": 32, **SIZES}
LINEAR = [(16, 16)] * 4 * 2 + [(16, 32), (32, 16)] * 2 + [(16, 16), (16, 2)]  # two layers, the pooler, the classifier


def write_config(path):
    """Writes a folder with nothing but a config."""
    BertConfig(**DIMS, architectures=["BertModel"]).save_pretrained(path)
    return path


def settings_for(folder, output, **more):
    given = {"methods": "all", "draws": 2, "warmup": 1, "steps": 2, "device": "cpu"} | more
    return BenchSettings(
        model=str(folder), batch_size=2, seq_len=8, budget=BUDGET, threads=1, output=str(output), **given
    )
