"""Checks that a wrapped or changed model works under the plain model's names, or that `select` refuses it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import as_lists, assert_same_tensors, batches, mlp, snapshot, train
from models import bert_classifier
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import unmask
from unmask.delta.base import missing_from_checkpoint
from unmask.errors import DeltaError, MethodError

dynamo_looks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(depth=3)


def compiled_inside(model: nn.Module) -> nn.Module:
    model[2] = compiled(model[2])
    return model


def all_inside(model: nn.Module) -> nn.Module:
    model[0], model[4] = nn.DataParallel(model[0]), checkpoint_wrapper(model[4])
    return model


def prepared(model: nn.Module) -> nn.Module:
    return pytest.importorskip("accelerate").Accelerator(cpu=True).prepare(model)


def fabric(model: nn.Module) -> nn.Module:
    return pytest.importorskip("lightning").Fabric(accelerator="cpu", devices=1).setup_module(model)


def run(wrap, wrapped_first: bool = True) -> tuple[nn.Module, unmask.Selection]:
    """Trains a model in a wrapper for three steps, selected from before or after it was wrapped."""
    model = body()
    outside = wrap(model) if wrapped_first else model
    selection = unmask.select(outside, unmask.id3(12, steps=3))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.05)
    train(outside if wrapped_first else wrap(model), optimizer, batches(3))
    return outside, selection


@dynamo_looks
@pytest.mark.parametrize("wrapped_first", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        compiled,
        nn.DataParallel,
        compiled_inside,
        all_inside,
        prepared,
        fabric,
        lambda m: nn.DataParallel(compiled(m)),
    ],
    ids=["compile", "DataParallel", "compiled inside", "wrapped inside", "accelerate", "Fabric", "both"],
)
def test_a_wrapped_model_trains_as_the_plain_one(wrap, wrapped_first):
    plain, reference = run(lambda m: m)
    _, selection = run(wrap, wrapped_first)
    assert as_lists(selection.indices) == as_lists(reference.indices)
    delta = selection.delta()
    assert delta.base == reference.delta().base
    reference.release()
    for fresh in (body(), wrap(body())):
        delta.apply(fresh)
        inside = dict(zip(snapshot(plain), fresh.state_dict().values(), strict=False))
        assert_same_tensors(inside, snapshot(plain))
    selection.release()
    torch.compiler.reset()


def test_a_users_own_module_that_is_called_module_keeps_its_name():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = body()

        def forward(self, x):
            return self.module(x)

    selection = unmask.select(nn.DataParallel(Holder()), unmask.pafi(3))
    assert all(name.startswith("module.") for name in selection.indices)


def test_a_wrapped_model_is_known_to_be_selected_from():
    model = body()
    selection = unmask.select(model, unmask.pafi(3))
    with pytest.raises(MethodError, match=r"release\(\) first"):
        unmask.select(compiled(model), unmask.pafi(3))
    with pytest.raises(DeltaError, match="live selection"):
        selection.delta().apply(nn.DataParallel(model))


# New heads, which the checkpoint lacks.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    bert_classifier(30, hidden_size=8, num_hidden_layers=1, intermediate_size=16).base_model.save_pretrained(folder)
    return folder


def with_new_head(folder, seed: int = 1) -> nn.Module:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(folder).eval()


class Held(nn.Module):
    """Holds its model as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)


def lightning_module(model: nn.Module) -> nn.Module:
    base = pytest.importorskip("lightning").LightningModule

    class Module(base):
        def __init__(self, model):
            super().__init__()
            self.model = model

        forward = Held.forward

    return Module(model)


@dynamo_looks
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [(lambda m: m, ""), (compiled, ""), (nn.DataParallel, ""), (Held, "model."), (lightning_module, "model.")],
    ids=["plain", "compile", "DataParallel", "held", "Lightning"],
)
def test_a_new_head_travels_whole(checkpoint, wrap, prefix):
    model = with_new_head(checkpoint)
    outside = wrap(model)
    heads = {f"{prefix}classifier.weight", f"{prefix}classifier.bias"}
    assert missing_from_checkpoint(outside) == heads
    selection = unmask.select(outside, unmask.id3(20, steps=2))
    optimizer = torch.optim.AdamW(selection.parameters(), lr=1e-2)
    batch = {"input_ids": torch.arange(16).view(2, 8), "labels": torch.tensor([0, 1])}
    for _ in range(2):
        outside(**batch).loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    delta = selection.delta()
    assert delta.whole.keys() == heads
    for fresh in [with_new_head(checkpoint, seed=2)] if not prefix else []:
        delta.apply(fresh)
        assert_same_tensors(snapshot(fresh), snapshot(model))
    again = wrap(with_new_head(checkpoint, seed=3))
    delta.apply(again)
    assert_same_tensors(snapshot(again), snapshot(outside))
    torch.compiler.reset()


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft with transformers 5
def test_a_compiled_model_with_a_lora(checkpoint):
    peft = pytest.importorskip("peft")

    def lora() -> nn.Module:
        torch.manual_seed(3)
        base = with_new_head(checkpoint)
        return peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], init_lora_weights=False))

    results = []
    for wrap in (lambda m: m, compiled):
        model = lora()
        selection = unmask.select(wrap(model), unmask.pafi(10), include="lora_")
        delta = selection.delta()
        results.append((as_lists(selection.indices), delta.base, sorted(delta.whole)))
        selection.release()
    assert results[0] == results[1]
    assert any("lora_A" in name for name in results[0][2])


# Wrappers that are refused.


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel_by_processes_is_refused(one_process):
    model = body()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(MethodError, match=r"DistributedDataParallel.*give unmask.select the plain model"):
        unmask.select(wrapped, unmask.pafi(3))
    assert all(p.requires_grad for p in model.parameters())
    unmask.select(wrapped.module, unmask.pafi(3)).release()


@pytest.mark.filterwarnings("ignore")
def test_fsdp1_is_refused(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = FullyShardedDataParallel(body(), device_id=torch.device("cpu"))
    with pytest.raises(MethodError, match="fully_shard"):
        unmask.select(wrapped, unmask.pafi(3))


def test_data_parallel_over_several_devices_is_refused():
    wrapped = nn.DataParallel(body())
    wrapped.device_ids = [0, 1]  # This is so on a machine with two GPUs.
    with pytest.raises(MethodError, match=r"DataParallel over 2 devices.*torchrun"):
        unmask.select(nn.Sequential(wrapped), unmask.pafi(3))


def test_a_deepspeed_engine_is_refused():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = body()
    with pytest.raises(MethodError, match="DeepSpeed engine"):
        unmask.select(engine, unmask.pafi(3))


def meta(folder) -> nn.Module:
    with torch.device("meta"):
        return body()


def offloaded_to_cpu(folder) -> nn.Module:
    return pytest.importorskip("accelerate").cpu_offload(body(), torch.device("cpu"))


def offloaded_to_disk(folder) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(body(), str(folder), torch.device("cpu"))


def partly_offloaded(folder) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    device_map = {"0": "cpu", "1": "cpu", "2": "disk", "3": "cpu", "4": "disk", "5": "cpu"}
    return accelerate.dispatch_model(body(), device_map, main_device="cpu", offload_dir=str(folder))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [meta, offloaded_to_cpu, offloaded_to_disk, partly_offloaded])
def test_a_model_without_data_is_refused(make, tmp_path):
    model = make(tmp_path)
    with pytest.raises(
        MethodError, match=r"'[02].(weight|bias)' is on the meta device.*from_pretrained without device_map"
    ):
        unmask.select(model, unmask.pafi(3), include=r"^0\.")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_is_refused_until_it_has_a_shape():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(MethodError, match="run one forward"):
        unmask.select(model, unmask.pafi(3))
    model(torch.ones(2, 4))
    assert unmask.select(model, unmask.pafi(3)).used == 3


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = body()
    with pytest.raises(MethodError, match="inference_mode"):
        unmask.select(model, unmask.pafi(3))


# Changed models that work without a wrapper's name.


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.parametrizations.orthogonal]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_a_parametrized_layer_trains_its_own_parameters(norm):
    def model() -> nn.Module:
        made = body()
        norm(made[2])
        return made

    trained = model()
    selection = unmask.select(trained, unmask.id3(12, steps=2), include=r"^2\.")
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    train(trained, optimizer, batches(2))
    assert any("original" in name or "_g" in name or "_v" in name for name in selection.indices)
    delta = selection.delta()
    fresh = model()
    delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(trained))
    x = batches(1)[0]
    torch.testing.assert_close(fresh(x), trained(x))


def test_functional_call_computes_with_the_given_tensors_and_leaves_the_selection_working():
    model = body()
    selection = unmask.select(model, unmask.id3(12, steps=2))
    optimizer = torch.optim.SGD(selection.parameters(), lr=0.1)
    x, others = batches(1)[0], {name: p.detach() * 2 for name, p in body().named_parameters()}
    expected = torch.func.functional_call(copy.deepcopy(model), others, (x,))
    assert torch.equal(torch.func.functional_call(model, others, (x,)), expected)
    own = torch.func.functional_call(model, dict(model.named_parameters()), (x,))
    own.square().mean().backward()
    optimizer.step()
    assert selection.used == 6


def test_lightnings_module_trains_under_its_own_names():
    class Net(pytest.importorskip("lightning").LightningModule):
        def __init__(self):
            super().__init__()
            self.model = body()

        def forward(self, x):
            return self.model(x)

    net = Net()
    selection = unmask.select(net, unmask.id3(12, steps=2))
    train(net, torch.optim.SGD(selection.parameters(), lr=0.1), batches(2))
    fresh = Net()
    selection.delta().apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(net))


# Compiled Trainers.


def trainer_arguments(folder, **more):
    from transformers import TrainingArguments

    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
    }
    return TrainingArguments(
        str(folder), save_strategy="no", logging_strategy="no", disable_tqdm=True, **settings, **more
    )


def rows() -> list[dict]:
    return [{"input_ids": torch.arange(8) + i % 3, "labels": i % 2} for i in range(12)]


@dynamo_looks
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_trainer_with_a_config_makes_the_same_run(checkpoint, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import Trainer

    import unmask.peft

    results = []
    for compile_it in (False, True):
        config = unmask.peft.SelectiveConfig(task_type="SEQ_CLS", budget=20, method="random_mask")
        model = peft.get_peft_model(with_new_head(checkpoint).train(), config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        arguments = trainer_arguments(
            tmp_path, torch_compile=compile_it, torch_compile_backend="eager" if compile_it else None
        )
        Trainer(model, arguments, train_dataset=rows()).train()
        delta = unmask.peft.delta(model)
        results.append((delta.base, {n: e.indices.tolist() for n, e in delta.sparse.items()}, dict(delta.whole)))
        torch.compiler.reset()
    assert results[0][:2] == results[1][:2]
    assert sum(map(len, results[0][1].values())) == 20
    torch.testing.assert_close(results[0][2], results[1][2])


@dynamo_looks
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_selective_trainer(checkpoint, tmp_path):
    pytest.importorskip("accelerate")
    from unmask.integrations.trainer import SelectiveTrainer

    arguments = trainer_arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    model = with_new_head(checkpoint)
    trainer = SelectiveTrainer(
        model=model, args=arguments, train_dataset=rows(), selection=lambda steps: unmask.id3(20, steps)
    )
    trainer.train()
    delta = trainer.selection.delta()
    assert sorted(delta.whole) == ["classifier.bias", "classifier.weight"]
    fresh = with_new_head(checkpoint, seed=2)
    delta.apply(fresh)
    assert_same_tensors(snapshot(fresh), snapshot(model))
    torch.compiler.reset()
