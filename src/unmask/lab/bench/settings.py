"""What a benchmark run is told: one frozen value, checked where it enters. No torch here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError
from unmask.lab.bench.grouping import SHARE
from unmask.lab.bench.rows import Row, parse_rows
from unmask.lab.bench.shapes import SHAPES, Shape

DTYPES = ("float32", "autocast", "bf16")
DEVICES = ("auto", "cpu", "cuda")
CURVES = ("budget", "size", "selection")


@dataclass(frozen=True)
class BenchSettings:
    """Everything a benchmark depends on; it is written into the JSON.

    Attributes:
        model: A shape's name, a folder with a ``config.json``, or the id of a model in the local hub cache. Only the
            config is read: weights are random.
        batch_size: Sequences per batch; None for the shape's own.
        seq_len: Tokens per sequence; None for the shape's own.
        budget: B.
        dtype: ``"float32"``, ``"autocast"`` (float32 weights, bfloat16 autocast) or ``"bf16"`` (bfloat16 weights).
        methods: Rows, comma-separated; see `unmask.lab.bench.rows.parse_rows`.
        rounds: Timed rounds; in each, every row runs its steps.
        warmup: Rounds before those, not counted.
        draws: How often everything starts anew: every row is built again, in a new process if rows have one, warmed up and
            timed for its rounds. A process keeps its memory layout, and with it its speed, for as long as it lives.
        steps: Steps per round of a row without a stride; strided rows run whole cycles.
        threads: CPU threads.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"``: CUDA where there is one.
        dropout: Every dropout probability of the model's config; None for the config's own.
        lora_r: LoRA's rank.
        memory: Measure peak memory, each row in a process of its own.
        timing: Measure step times.
        processes: Time each row in a process of its own; None: on the CPU, but not for curves.
        isolate: Never hold more than one row and the reference at a time.
        memory_share: How much of the free memory the rows of a group may fill, by an estimate; above 0, at most 1.
        curve: A scaling curve instead of the table: budget, size or selection.
        output: Folder of the results.
        seed: Of weights, batches and random masks.
    """

    model: str = "roberta-base"
    batch_size: int | None = None
    seq_len: int | None = None
    budget: int = 320_000
    dtype: str = "float32"
    methods: str = "all"
    rounds: int = 5
    warmup: int = 1
    draws: int = 1
    steps: int = 3
    threads: int = 2
    device: str = "auto"
    dropout: float | None = None
    lora_r: int = 8
    memory: bool = True
    timing: bool = True
    processes: bool | None = None
    isolate: bool = False
    memory_share: float = SHARE
    curve: str | None = None
    output: str = "runs/bench"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, DEVICES)
        if self.curve is not None:
            _one_of("curve", self.curve, CURVES)
            if self.processes:
                raise ConfigError("processes = True with a curve; the rows of a curve share one process, leave it out.")
        for name in ("budget", "rounds", "warmup", "draws", "steps", "threads", "lora_r"):
            _at_least(name, getattr(self, name), 1)
        for name, least in (("batch_size", 1), ("seq_len", 2)):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), least)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout = {self.dropout!r}; it must be at least 0 and below 1.")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(f"memory_share = {self.memory_share!r}; it must be above 0 and at most 1.")
        if not self.memory and not self.timing:
            raise ConfigError("neither memory nor timing is to be measured; leave at least one of them on.")
        if self.model not in SHAPES and "/" not in self.model and not Path(self.model).is_dir():
            raise ConfigError(
                f"model {self.model!r} is no folder and no shape; the shapes are {', '.join(SHAPES)}, or give a folder "
                "with a config.json or the id of a cached model (owner/name)."
            )
        self.rows()

    def rows(self) -> list[Row]:
        """The rows, in order."""
        return parse_rows(self.methods, self.budget)

    def sized(self, shape: Shape) -> Shape:
        """The shape with this run's batch size and sequence length."""
        return dataclasses.replace(shape, batch=self.batch_size or shape.batch, length=self.seq_len or shape.length)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} = {value!r}; it must be one of {', '.join(allowed)}.")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} = {value!r}; it must be a whole number, at least {least}.")
