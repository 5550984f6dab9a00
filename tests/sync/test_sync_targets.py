"""Checks fused tensors, tensor-parallel slices, and both together, against slices of the trainer's tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from models import llama_writer
from sync_runs import Pair
from torch import Tensor, nn

import unmask
from unmask import SyncError
from unmask.sync import Shard
from unmask.sync.targets import Targets

QKV = "model.layers.*.self_attn."
FUSED = {
    f"{QKV}qkv_proj.weight": [f"{QKV}{which}_proj.weight" for which in "qkv"],
    "*.mlp.gate_up_proj.weight": ["*.mlp.gate_proj.weight", "*.mlp.up_proj.weight"],
}
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
COLUMNS = ("o_proj", "down_proj")
METHODS = {"pafi": lambda: unmask.pafi(400), "repeat_d3": lambda: unmask.repeat_d3(400), "full": unmask.full}
IDS = torch.randint(0, 50, (4, 12), generator=torch.Generator().manual_seed(3))


def loss(model: nn.Module, step: int) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


class Served(nn.Module):
    """Holds tensors under the names of a serving engine."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, last = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module._modules[part]  # type: ignore[assignment]
            module.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))


def served(model: nn.Module, fused: bool, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """Returns what rank of a serving engine's group holds of a model: by plain slicing and concatenation."""
    held = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, tensor in held.items():
        kind = name.split(".")[-2]
        if kind in ROWS or kind == "embed_tokens":
            held[name] = tensor.chunk(ranks, 0)[rank]
        elif kind in COLUMNS:
            held[name] = tensor.chunk(ranks, 1)[rank]
    if fused:
        for name in list(held):
            if name.endswith("q_proj.weight"):
                parts = [held.pop(name.replace("q_proj", f"{which}_proj")) for which in "qkv"]
                held[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
            elif name.endswith("gate_proj.weight"):
                parts = [held.pop(name), held.pop(name.replace("gate_proj", "up_proj"))]
                held[name.replace("gate_proj", "gate_up_proj")] = torch.cat(parts)
    return held


def cuts(rank: int, ranks: int) -> dict[str, Shard]:
    rows = {f"*.{name}.weight": Shard(0, rank, ranks) for name in (*ROWS, "embed_tokens")}
    return rows | {f"*.{name}.weight": Shard(1, rank, ranks) for name in COLUMNS}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", METHODS)
def test_a_serving_engines_tensors_are_slices_of_the_trainers(name, fused, ranks):
    dtype = torch.bfloat16 if name == "pafi" else torch.float32
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = llama_writer(52, **sizes).to(dtype)
    pairs = []
    transport = None
    for rank in range(ranks):
        rollout = Served(served(model, fused, rank, ranks))
        layouts = {"fused": FUSED if fused else None, "shard": cuts(rank, ranks) if ranks > 1 else None}
        pairs.append((rank, rollout, layouts))
    trainer = Pair(METHODS[name](), model, loss, transport=transport)
    receivers = [(rank, each, unmask.sync.Receiver(each, trainer.tape, **how)) for rank, each, how in pairs]
    for _ in range(4):
        trainer.step()
        for rank, rollout, receiver in receivers:
            assert receiver.receive(timeout=0) == trainer.publisher.version
            expected = served(model, fused, rank, ranks)
            held = dict(rollout.named_parameters())
            assert held.keys() == expected.keys()
            assert all(torch.equal(held[each], expected[each]) for each in expected)


def test_the_base_of_a_slice_is_checked_too():
    model = llama_writer()
    first, second = served(model, True, 0, 2), served(model, True, 1, 2)
    trainer = Pair(unmask.pafi(4_000), model, loss)
    name = "model.layers.1.mlp.down_proj.weight"
    flat = trainer.selection.indices[name]
    row, column = divmod(int(flat[flat % 32 >= 16][-1]), 32)
    second[name][row, column - 16] += 1
    receivers = [
        unmask.sync.Receiver(Served(held), trainer.tape, FUSED, cuts(rank, 2))
        for rank, held in enumerate((first, second))
    ]
    trainer.step()
    assert receivers[0].receive(timeout=0) == 1
    with pytest.raises(SyncError, match=r"'model.layers.1.mlp.down_proj.weight' has other values at 1 of"):
        receivers[1].receive(timeout=0)


def test_a_part_may_be_given_by_its_bounds_and_be_renamed():
    model = llama_writer()
    rollout = Served({"head": model.lm_head.weight[10:30], "norm": model.model.norm.weight})
    for name, p in model.named_parameters():
        if name not in ("lm_head.weight", "model.norm.weight"):
            rollout.register_parameter(name.replace(".", "_"), nn.Parameter(p.detach().clone()))
    trainer = Pair(unmask.pafi(200), model, loss, include="lm_head|model.norm")
    renamed = {"head": ["lm_head.weight"], "norm": ["model.norm.weight"]}
    receiver = unmask.sync.Receiver(rollout, trainer.tape, renamed, {"lm_head.weight": (0, 10, 30)})
    for _ in range(3):
        trainer.step()
        receiver.receive(timeout=0)
        assert torch.equal(rollout.head, model.lm_head.weight[10:30])
        assert torch.equal(rollout.norm, model.model.norm.weight)


@pytest.mark.parametrize("name", ["pafi", "full"])
def test_a_fused_tensor_of_parts_that_are_cut_by_columns(name):
    model = llama_writer()
    prefix = "model.layers.0.mlp."
    parts = [model.get_parameter(f"{prefix}{which}_proj.weight") for which in ("gate", "up")]
    held = {n: p for n, p in model.named_parameters() if not n.startswith((f"{prefix}gate", f"{prefix}up"))}
    rollout = Served(held | {f"{prefix}gate_up_proj.weight": torch.cat(parts)[:, 4:12]})
    trainer = Pair(METHODS[name](), model, loss)
    names = [f"{prefix}{which}_proj.weight" for which in ("gate", "up")]
    shard = dict.fromkeys(names, (1, 4, 12))
    receiver = unmask.sync.Receiver(rollout, trainer.tape, {f"{prefix}gate_up_proj.weight": names}, shard)
    for _ in range(3):
        trainer.step()
        receiver.receive(timeout=0)
        assert torch.equal(rollout.get_parameter(f"{prefix}gate_up_proj.weight"), torch.cat(parts)[:, 4:12])


def test_columns_of_a_tensor_of_three_dimensions():
    class Filters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 8, 3))

        def forward(self, step: int) -> Tensor:
            return (self.weight * (step + 1)).square().sum()

    model = Filters()
    halves = [Filters() for _ in range(2)]
    for half, rollout in enumerate(halves):
        rollout.weight.data = model.weight.detach()[:, 4 * half : 4 * half + 4].clone()
    trainer = Pair(unmask.static_d3(40), model, lambda model, step: model(step))
    receivers = [
        unmask.sync.Receiver(each, trainer.tape, shard={"weight": Shard(1, half, 2)})
        for half, each in enumerate(halves)
    ]
    for _ in range(3):
        trainer.step()
        for receiver in receivers:
            receiver.receive(timeout=0)
        assert torch.equal(torch.cat([each.weight for each in halves], 1), model.weight)


@pytest.mark.parametrize(
    ("fused", "shard", "match"),
    [
        ({"*.qkv": ["q", "k"]}, None, "equally many"),
        ({"*.qkv": []}, None, "equally many"),
        ({"model.norm.weight": ["model.norms.weight"]}, None, "no tensor of that name"),
        ({"model.norm.weight": ["model.norm.weight", "model.norm.weight"]}, None, "gives it"),
        (None, {"model.norm.weight": Shard(0, 2, 2)}, "rank is below ranks"),
        (None, {"model.norm.weight": Shard(1, 0, 2)}, "dimension 1 cannot be divided by 2"),
        (None, {"model.norm.weight": Shard(0, 0, 5)}, "dimension 0 cannot be divided by 5"),
        (None, {"model.norm.weight": (0, 4, 99)}, r"no part \(0, 4, 99\)"),
        (None, {"model.norm.weight": (0, 0, 8)}, r"gives it \(8,\)"),
        (None, {"lm_head.weight": (1, 0, 8)}, r"gives it \(50, 8\)"),
    ],
)
def test_layouts_that_cannot_be_are_refused(fused, shard, match):
    model = llama_writer()
    rollout = copy.deepcopy(model)
    trainer = Pair(unmask.pafi(10), model, loss)
    trainer.step()

    def receive() -> None:
        receiver = unmask.sync.Receiver(rollout, trainer.tape, fused, shard)
        trainer.publisher.resync()
        receiver.receive(timeout=0)

    with pytest.raises(SyncError, match=match):
        receive()


def test_quantised_receivers_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    with pytest.raises(SyncError, match=r"'0.weight' is quantised in the receiver's model"):
        Targets(nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)), None, None)
