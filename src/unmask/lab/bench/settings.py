"""The settings of a benchmark run, checked as soon as they are given. This module imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unmask.errors import ConfigError
from unmask.lab.bench.rows import APART, KINDS, Row, parse_rows
from unmask.lab.bench.shapes import SHAPES, Shape
from unmask.lab.training.fields import setting, settings_of


@dataclass(frozen=True)
class BenchSettings:
    """The settings that a benchmark run depends on. The run writes them into its record.

    The help text of each field says what the field means; the options of ``unmask bench`` are made from them.

    Raises:
        ConfigError: A value is not allowed; the message says which values are.

    Example:
        >>> [row.label for row in BenchSettings(methods="frozen,static@1000").rows()]
        ['frozen', 'static@1000']
    """

    model: str = setting(
        "roberta-base",
        f"The model: a shape ({', '.join(SHAPES)}), a folder with a config.json, or the id of a model in the local hub "
        "cache. Only the config is read: the weights are random and nothing is downloaded.",
    )
    batch_size: int | None = setting(None, "Sequences per batch; by default the shape's own number.")
    seq_len: int | None = setting(None, "Tokens per sequence; by default the shape's own number.")
    budget: int = setting(320_000, "The budget B: how many scalar weights unmask trains.")
    dtype: Literal["float32", "autocast", "bf16"] = setting(
        "float32", "float32; autocast (float32 weights, bfloat16 autocast); or bf16 (bfloat16 weights)."
    )
    methods: str = setting(
        "all",
        f"The rows to measure, separated by commas: {', '.join(KINDS | APART)} (id3-K for a stride of K), NAME@BUDGET for "
        "another budget, or all.",
    )
    draws: int = setting(3, "How often each row is measured, every time in a fresh process.")
    warmup: int = setting(2, "Training steps of each process before the timed ones.")
    steps: int = setting(
        3, "Timed steps of each process. A row with a stride runs whole cycles, at least this many steps."
    )
    threads: int = setting(2, "CPU threads.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "cpu, cuda, or auto, which takes CUDA if there is a CUDA device."
    )
    dropout: float | None = setting(None, "Every dropout probability of the model; by default those of its config.")
    lora_r: int = setting(8, "The rank of LoRA.")
    curve: Literal["budget", "size", "selection"] | None = setting(
        None, "A scaling curve to measure instead of the table: budget, size or selection."
    )
    host: bool = setting(
        False,
        "Measure instead what a step costs the host of a GPU, on any machine: seconds, operations, and operations that wait.",
    )
    delta: bool = setting(
        False,
        "Measure instead how long a loaded model takes to go to another task: by deltas, a whole checkpoint and LoRA.",
    )
    calibrate: bool = setting(
        False, "Measure instead what products cost on this device, and keep it for the choices of the engine."
    )
    output: str = setting("runs/bench", "The folder for the results.")
    seed: int = setting(0, "The seed of the weights, the batches and the random masks.")

    def __post_init__(self) -> None:
        for name in ("dtype", "device", "curve"):
            settings_of(BenchSettings)[name].check(getattr(self, name))
        for name in ("budget", "draws", "warmup", "steps", "threads", "lora_r", "batch_size", "seq_len"):
            value, least = getattr(self, name), 2 if name == "seq_len" else 1
            given = value is not None or name not in ("batch_size", "seq_len")
            if given and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"{name} = {value!r}; it must be a whole number, at least {least}.")
        chosen = [name for name in ("curve", "host", "delta", "calibrate") if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} are measured one at a time; give one of them.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout!r}; it must be at least 0 and below 1.")
        if self.model not in SHAPES and "/" not in self.model and not Path(self.model).is_dir():
            raise ConfigError(
                f"model {self.model!r} is neither a folder nor a shape; the shapes are {', '.join(SHAPES)}. Give one of "
                "them, a folder with a config.json, or the id of a cached model (owner/name)."
            )
        self.rows()

    def rows(self) -> list[Row]:
        """Returns the rows to measure, in the order in which they were named."""
        return parse_rows(self.methods, self.budget)

    def sized(self, shape: Shape) -> Shape:
        """Returns the shape with this run's batch size and sequence length, where these are given."""
        return dataclasses.replace(shape, batch=self.batch_size or shape.batch, length=self.seq_len or shape.length)
