"""Finds the quantised weight matrices of a model, and reads entries and rows of them as float32.

A *source* is the reader of one layer's weight; it never reads the weight as a whole. The libraries are recognised by the names
of their classes, so that none is imported. A source reads the tensors that the layer keeps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmask.gradients.wrappers import named_parameters

_REPACKS = "support_avx512bf16_for_cpu"  # This attribute of a Linear4bit lets it repack its weight.
_HELD = "_unmask_held"  # The attribute that keeps its value while `hold` has changed it.
_ADVICE = "or leave it out with exclude="


class Source(ABC):
    """The reader of one layer's quantised weight.

    Attributes:
        layer: The layer that holds the weight. Its tensors are looked up at every call, for a layer may be moved.
        hides_bias: True if the layer hands its bias to an autograd Function itself, so that taps do not see it.
    """

    hides_bias: bool = False

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @property
    @abstractmethod
    def kind(self) -> str:
        """The library and the format, for reports and metadata."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (out, in) of the weight."""

    @property
    def device(self) -> torch.device:
        """The device of the layer."""
        return self.layer.weight.device

    @abstractmethod
    def rows(self, low: int, high: int) -> Tensor:
        """Returns the rows ``low`` to ``high - 1``: (high - low, in) float32."""

    @abstractmethod
    def entries(self, flat: Tensor) -> Tensor:
        """Returns the entries at flat (row-major) indices (m,): (m,) float32."""

    @abstractmethod
    def stored(self) -> Mapping[str, Tensor]:
        """Returns all tensors that determine the weight, by name: those the layer keeps, and how they are encoded."""

    def hold(self) -> None:
        """Keeps the layer from changing what it stores."""
        return

    def free(self) -> None:
        """Ends `hold`."""
        return


@dataclass(frozen=True)
class Unsupported:
    """A quantised weight that cannot be selected from.

    Attributes:
        reason: The reason, and what the user can do. An error text has it after the weight's name.
    """

    reason: str


_UNREADY = Unsupported(
    "is not quantised yet; move the model to its device first, or, if it is a new head, keep it out of the quantisation "
    f"(transformers: llm_int8_skip_modules=[...]), {_ADVICE}"
)


class Int8(Source):
    """The reader of bitsandbytes' Linear8bitLt: int8 in rows, and a scale per row."""

    kind = "bitsandbytes int8"
    hides_bias = True  # It calls MatMul8bitLt.apply(x, weight, out, bias, state).

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.layer.weight.shape)

    def rows(self, low: int, high: int) -> Tensor:
        return self.layer.weight.data[low:high].float() * self._scales()[low:high, None]

    def entries(self, flat: Tensor) -> Tensor:
        return self.layer.weight.data.view(-1)[flat].float() * self._scales()[flat // self.shape[1]]

    def stored(self) -> Mapping[str, Tensor]:
        return {"weight": self.layer.weight.data, "SCB": _row_maxima(self.layer)}

    def _scales(self) -> Tensor:
        return _row_maxima(self.layer).float() * (1.0 / 127.0)


class FourBit(Source):
    """The reader of bitsandbytes' Linear4bit: two entries to a byte, a table of 16 values, and a scale per block.

    The scales may be quantised themselves (nested).
    """

    @property
    def kind(self) -> str:
        return f"bitsandbytes {self.layer.weight.quant_state.quant_type}"

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.layer.weight.quant_state.shape)

    def rows(self, low: int, high: int) -> Tensor:
        columns = self.shape[1]
        flat = torch.arange(low * columns, high * columns, device=self.device)
        return self.entries(flat).view(high - low, columns)

    def entries(self, flat: Tensor) -> Tensor:
        state = self.layer.weight.quant_state
        pair = self._bytes()[flat // 2]
        code = torch.where(flat % 2 == 0, pair >> 4, pair & 15)  # The first of a pair is in the high bits.
        return state.code.index_select(0, code.int()).float() * self._scales(flat // state.blocksize)

    def stored(self) -> Mapping[str, Tensor]:
        state = self.layer.weight.quant_state
        tensors = {"weight": self._bytes(), "absmax": state.absmax, "code": state.code}
        if state.nested:
            tensors |= {"absmax2": state.state2.absmax, "code2": state.state2.code, "offset": state.offset}
        how = f"{state.quant_type} {tuple(state.shape)} {state.blocksize} {state.dtype}"
        return tensors | {"how": torch.tensor(list(how.encode()), dtype=torch.uint8)}

    def hold(self) -> None:
        """Keeps evaluation from repacking the weight on a CPU with AVX512-BF16, which rounds its scales for good."""
        own = self.layer.__dict__
        if _REPACKS in own and _HELD not in own:
            own[_HELD], own[_REPACKS] = own[_REPACKS], False

    def free(self) -> None:
        own = self.layer.__dict__
        if _HELD in own:
            own[_REPACKS] = own.pop(_HELD)

    def _bytes(self) -> Tensor:
        return self.layer.weight.data.view(torch.uint8).view(-1)

    def _scales(self, blocks: Tensor) -> Tensor:
        state = self.layer.weight.quant_state
        if not state.nested:
            return state.absmax[blocks].float()
        outer = state.state2
        code = outer.code.index_select(0, state.absmax[blocks].int())
        return code.float() * outer.absmax[blocks // outer.blocksize].float() + state.offset


class TorchaoInt8(Source):
    """The reader of torchao's Int8Tensor: int8, and a scale (and a zero point) per row, per group or for the whole matrix."""

    kind = "torchao int8"

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.layer.weight.qdata.shape)

    @property
    def device(self) -> torch.device:
        return self.layer.weight.qdata.device

    def rows(self, low: int, high: int) -> Tensor:
        row = torch.arange(low, high, device=self.device)[:, None]
        column = torch.arange(self.shape[1], device=self.device)
        return self._read(self.layer.weight.qdata[low:high], row, column)

    def entries(self, flat: Tensor) -> Tensor:
        columns = self.shape[1]
        return self._read(self.layer.weight.qdata.reshape(-1)[flat], flat // columns, flat % columns)

    def stored(self) -> Mapping[str, Tensor]:
        weight = self.layer.weight
        names = ("qdata", "scale", "zero_point")
        how = f"{list(weight.block_size)} {weight.dtype}"
        tensors = {name: part for name in names if (part := getattr(weight, name)) is not None}
        return tensors | {"how": torch.tensor(list(how.encode()), dtype=torch.uint8)}

    def _read(self, codes: Tensor, row: Tensor, column: Tensor) -> Tensor:
        weight = self.layer.weight
        block = row // weight.block_size[0], column // weight.block_size[1]
        codes = codes.float()
        if weight.zero_point is not None:
            codes = codes - weight.zero_point[block].float()
        return codes * weight.scale[block].float()


def source_of(layer: Any) -> Source | Unsupported | None:
    """Returns the reader of a layer's weight, or the reason why there is none; None if the weight is not quantised."""
    weight: Any = layer._parameters.get("weight")  # Not layer.weight, which may be computed.
    if weight is None:
        return None
    names = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__.startswith("bitsandbytes.")}
    if "Linear8bitLt" in names:
        if layer.state.has_fp16_weights:
            return Unsupported(f"keeps float weights; build its Linear8bitLt with has_fp16_weights=False, {_ADVICE}")
        return Int8(layer) if weight.dtype == torch.int8 and _row_maxima(layer) is not None else _UNREADY
    if "Linear4bit" in names:
        state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
        if state is None:
            return _UNREADY
        if hasattr(state, "packing_format_for_cpu"):  # The first repacking sets it, and nothing removes it.
            return Unsupported(
                "was evaluated before, and bitsandbytes then repacked it for this CPU and rounded its scales, so it is no "
                f"longer the weight that was loaded; load the model again and evaluate it after unmask.select, {_ADVICE}"
            )
        if getattr(weight, "quant_state", None) is None:
            weight.quant_state = state  # The layer's own forward does the same.
        return FourBit(layer)
    if type(weight).__module__.startswith("torchao."):
        if not isinstance(layer, nn.Linear) or type(layer).__name__ == "NonDynamicallyQuantizableLinear":
            return Unsupported(
                f"is quantised, and only linear layers can have a sidecar, no {type(layer).__name__}; {_ADVICE[3:]}"
            )
        activations = getattr(weight, "act_quant_kwargs", None), getattr(weight, "act_pre_scale", None)
        if type(weight).__name__ != "Int8Tensor" or weight.ndim != 2 or activations != (None, None):
            return Unsupported(
                f"is a torchao {type(weight).__name__}; only int8 weights with float activations (Int8WeightOnlyConfig) can "
                f"be selected from: quantise it that way, {_ADVICE}"
            )
        return TorchaoInt8(layer)
    if type(weight).__module__.startswith("bitsandbytes."):
        return Unsupported(
            f"is in bitsandbytes' {type(layer).__name__}, which cannot be saved; keep that layer unquantised"
        )
    return None


def sources(model: nn.Module) -> dict[str, Source | Unsupported]:
    """Returns the readers of a model's quantised weights, by parameter name; `Unsupported` for those that have none."""
    holders: dict[int, list[nn.Module]] = {}
    for layer in model.modules():
        holders.setdefault(id(layer._parameters.get("weight")), []).append(layer)
    found: dict[str, Source | Unsupported] = {}
    for name, parameter in named_parameters(model).items():
        layers = holders.get(id(parameter), [])
        source = source_of(layers[0]) if layers else None
        if source is not None:
            found[name] = (
                source if len(layers) == 1 else Unsupported(f"is quantised and shared by layers; {_ADVICE[3:]}")
            )
    return found


def _row_maxima(layer: Any) -> Any:
    """Returns the scales of a Linear8bitLt times 127; its first forward moves them from the weight to the state."""
    own = getattr(layer.weight, "SCB", None)
    return own if own is not None else layer.state.SCB
