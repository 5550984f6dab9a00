"""Makes a small network in float and quantised by each library, and the float network equal to a quantised one."""

from __future__ import annotations

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unmask.quantised.layers import weights
from unmask.quantised.tensor import QuantisedTensor

WIDTH, HIDDEN = 64, 128  # bitsandbytes' AVX-512 kernel reads rows wrongly that are no multiple of its block of 64
KINDS = ("int8", "nf4", "fp4", "nf4 nested", "torchao", "torchao groups")
LIBRARY = {kind: "torchao" if kind.startswith("torchao") else "bitsandbytes" for kind in KINDS}


class Block(nn.Module):
    """Has two linear layers that get quantised, and a norm and a head that do not; ``twice`` uses the two twice per forward."""

    def __init__(self, checkpointed: bool | None = None, twice: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.checkpointed, self.twice = checkpointed, twice

    def body(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        return x + self.down(torch.sin(self.up(x))) if self.twice else x

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed is None:
            x = self.body(x)
        else:
            x = checkpoint(self.body, x.requires_grad_(), use_reentrant=self.checkpointed)
        return self.head(self.norm(x))


def plain(dtype: torch.dtype = torch.float32, **options: bool) -> Block:
    torch.manual_seed(0)
    return Block(**options).to(dtype)


def quantised(kind: str, dtype: torch.dtype = torch.float32, **options: bool) -> Block:
    """Returns the network with its two inner layers quantised, on the CPU."""
    pytest.importorskip(LIBRARY[kind])
    net = plain(dtype, **options)
    if kind.startswith("torchao"):
        _with_torchao(net, groups=kind.endswith("groups"))
    else:
        _with_bitsandbytes(net, kind)
    return net.requires_grad_(False).train()


def _with_bitsandbytes(net: Block, kind: str) -> None:
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name in ("up", "down"):
        layer = getattr(net, name)
        shape = layer.in_features, layer.out_features
        if kind == "int8":
            made = Linear8bitLt(*shape, has_fp16_weights=False)
        else:
            made = Linear4bit(*shape, quant_type=kind[:3], compress_statistics=kind.endswith("nested"))
        made.load_state_dict(layer.state_dict())
        setattr(net, name, made.to(layer.weight.dtype).to("cpu"))


def _with_torchao(net: Block, groups: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns when torchao is imported
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup, PerRow
    config = Int8WeightOnlyConfig(granularity=PerGroup(32) if groups else PerRow(), set_inductor_config=False)
    quantize_(net, config, filter_fn=lambda layer, name: name in ("up", "down"))


def whole(tensor: QuantisedTensor) -> Tensor:
    """Returns a quantised matrix de-quantised whole, which only a test may do."""
    return tensor.sidecar.rows(0, tensor.shape[0])


def as_float(net: nn.Module) -> Block:
    """Returns the float network that computes the same as a quantised one, up to rounding."""
    twin = plain(checkpointed=net.checkpointed, twice=net.twice)
    named = dict(twin.named_parameters())
    with torch.no_grad():
        for name, tensor in weights(net).items():
            named[name].copy_(whole(tensor) if isinstance(tensor, QuantisedTensor) else tensor)
    return twin.train()


def payload(net: nn.Module) -> dict[str, Tensor]:
    """Returns everything that a checkpoint of the network would hold, bit for bit."""
    return {name: copy.deepcopy(tensor) for name, tensor in net.state_dict().items()}


def data(step: int, rows: int = 16) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(step))


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(net(x).float(), torch.arange(len(x)) % 3)


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
