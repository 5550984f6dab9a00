"""Tests adapters on disk and on the hub: exact reloading, refusals of a wrong base or a damaged file, and the model card."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from helpers import assert_same_tensors, batches, mean_square, snapshot, travelling
from peft_nets import NO_BASE_FILE, OLD_NAMES, base_state, config, outputs, run, wrapped
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from transformers import AutoModelForSequenceClassification

import peft
import unmask
import unmask.peft
from unmask.errors import DeltaError, MethodError

pytestmark = [pytest.mark.filterwarnings(OLD_NAMES), pytest.mark.filterwarnings(NO_BASE_FILE)]


def saved(folder: Path, dtype: torch.dtype = torch.float32, **changes: object) -> tuple[peft.PeftModel, torch.Tensor]:
    _, model = wrapped(dtype, **changes)
    run(model)
    model.save_pretrained(folder)
    return model, outputs(model)


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_comes_back_bit_for_bit(tmp_path, dtype, low_memory, name):
    model, expected = saved(tmp_path, dtype, modules_to_save=["head"])
    again = peft.PeftModel.from_pretrained(travelling(dtype), tmp_path, name, low_cpu_mem_usage=low_memory)
    assert torch.equal(outputs(again), expected)
    assert_same_tensors(base_state(model), base_state(again))
    assert not any(p.requires_grad for p in again.parameters())
    with again.disable_adapter():
        assert torch.equal(outputs(again), outputs(travelling(dtype)))
    assert_same_tensors(snapshot(travelling(dtype)), snapshot(again.unload()))


def test_the_file_holds_the_budget_and_the_saved_modules_only(tmp_path):
    model, _ = saved(tmp_path, modules_to_save=["head"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    values = {key: t for key, t in tensors.items() if key.endswith(".unmask_values")}
    assert sum(t.numel() for t in values.values()) == 30
    assert all(key.startswith("base_model.model.") for key in tensors if not key.endswith(("header", "order")))
    assert {"base_model.model.head.weight", "base_model.model.head.bias"} <= tensors.keys()
    for key, t in values.items():
        indices = tensors[key.replace("values", "indices")]
        held = model.get_base_model().get_parameter(key[len("base_model.model.") : -len(".unmask_values")])
        assert torch.equal(held.detach().reshape(-1)[indices.long()], t)


def test_the_configuration_comes_back(tmp_path):
    saved(tmp_path, eps=0.5, exp=0.0, stride=2, exclude_modules=["norm", "body.2"], target_modules=["body"])
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, unmask.peft.SelectiveConfig)
    assert (loaded.budget, loaded.eps, loaded.exp, loaded.stride, loaded.total_steps) == (30, 0.5, 0.0, 2, 3)
    assert (loaded.target_modules, loaded.exclude_modules) == (["body"], ["norm", "body.2"])
    assert loaded.record["used"] == 30
    assert loaded.record["fingerprint"].startswith("sha256:")


def test_several_adapters_are_saved_and_loaded_separately(tmp_path):
    _, model = wrapped()
    run(model)
    model.add_adapter("second", config(method="pafi"))
    results = {"default": outputs(model)}
    model.set_adapter("second")
    run(model, 2)
    results["second"] = outputs(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(travelling(), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert torch.equal(outputs(again), results["default"])
    again.set_adapter("second")
    assert torch.equal(outputs(again), results["second"])


def test_an_adapter_loaded_as_trainable_trains_on(tmp_path):
    _, model = wrapped(budget=40, total_steps=4)
    run(model, 2, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(travelling(), tmp_path, is_trainable=True).train()
    for each in (model, again):  # plain SGD has no state: in float32 the runs agree
        run(each, 2, torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.5), seed=9)
    assert_same_tensors(base_state(model), base_state(again))
    assert again.base_model.deltas.active.used == 40


def test_loading_into_an_adapter_that_trains_replaces_what_it_holds(tmp_path):
    """A Trainer with load_best_model_at_end does this."""
    model, expected = saved(tmp_path)
    run(model, 2)
    assert not torch.equal(outputs(model), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(outputs(model), expected)
    run(model.train(), 1)
    assert_same_tensors(snapshot(travelling()), snapshot(model.unload()))


def test_saving_while_disabled_or_between_backward_and_step_saves_the_adapter(tmp_path):
    model, _ = saved(tmp_path / "before")
    mean_square(model, batches(1)[0]).backward()
    model.eval()
    with model.disable_adapter():
        model.save_pretrained(tmp_path / "disabled")
    again = peft.PeftModel.from_pretrained(travelling(), tmp_path / "disabled")
    for name, tensor in base_state(again).items():
        if "norm" not in name:
            assert torch.equal(tensor, base_state(model)[name]), name


@pytest.mark.parametrize("change", ["weight", "dtype"])
def test_another_base_is_refused_and_unchanged(tmp_path, change):
    saved(tmp_path)
    other = travelling(torch.bfloat16) if change == "dtype" else travelling(seed=1)
    before = snapshot(other)
    with pytest.raises(DeltaError, match="not the base of adapter 'default'"):
        peft.PeftModel.from_pretrained(other, tmp_path)
    assert_same_tensors(before, snapshot(other))


@pytest.mark.parametrize("damage", ["value", "missing", "header"])
def test_an_altered_file_is_refused(tmp_path, damage):
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("unmask_values"))
    if damage == "value":
        tensors[key][0] += 1
    elif damage == "missing":
        del tensors[key]
    else:
        del tensors["base_model.unmask_header"]
    save_file(tensors, path)
    with pytest.raises(DeltaError, match=r"checksum|header"):
        peft.PeftModel.from_pretrained(travelling(), tmp_path)


def test_the_adapter_as_a_delta_applies_to_the_plain_base(tmp_path):
    _, model = wrapped(modules_to_save=["head"])
    run(model)
    path = unmask.peft.delta(model).save(tmp_path / "delta.safetensors")
    plain = travelling()
    unmask.SparseDelta.load(path).apply(plain)
    assert torch.equal(outputs(plain), outputs(model))
    assert_same_tensors(snapshot(plain), snapshot(model.merge_and_unload()))


@pytest.fixture
def classifier(tmp_path):
    """Returns (a folder with a tiny BERT, a trained PEFT model of it with a new head)."""
    folder = tiny_model(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    given = unmask.peft.SelectiveConfig(task_type="SEQ_CLS", budget=50, target_modules="all-linear", total_steps=2)
    model = peft.get_peft_model(base, given).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(**example()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return folder, model.eval()


def example():
    return {"input_ids": torch.arange(12).view(2, 6), "labels": torch.tensor([0, 1])}


@torch.no_grad()
def logits(model):
    return model(**example()).logits


@pytest.mark.filterwarnings("ignore:.*use_return_dict")
def test_a_head_that_the_checkpoint_lacks_travels_with_the_adapter(tmp_path, classifier):
    folder, model = classifier
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(99)  # the new base gets another random head
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(logits(again.merge_and_unload()), logits(model))


def test_the_model_card_describes_the_adapter(tmp_path, classifier):
    folder, model = classifier
    for _ in range(2):  # the second save must not add a second section
        model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text()
    record = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["record"]
    assert card.count("## Selective fine-tuning") == 1
    assert card.startswith("---\nbase_model:")
    for text in (str(folder), record["fingerprint"], "id3 (eps 1.0, exp 2.0, steps 2)", "50 of ", "34 numbers"):
        assert text in card, text


class Hub:
    """Stands in for the hub with the methods that transformers calls; nothing leaves this process."""

    def __init__(self):
        self.repo, self.options, self.files = {}, {}, {}

    def create_repo(self, repo_id, **options):
        self.repo = options
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def create_commit(self, repo_id, operations, **options):
        self.options = options
        self.files = {o.path_in_repo: Path(o.path_or_fileobj).read_bytes() for o in operations}
        return f"https://an.address/{repo_id}"


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    return hub


@pytest.mark.parametrize("way", ["verb", "function", "copy"])
def test_a_push_uploads_the_adapter_with_its_card(hub, classifier, way):
    folder, model = classifier
    pushed = copy.deepcopy(model) if way == "copy" else model
    options = {"private": True, "token": "t", "commit_message": "first", "tags": ["reviews"]}
    push = unmask.peft.push_to_hub if way == "function" else type(model).push_to_hub
    assert push(pushed, "mine", **options) == "https://an.address/me/mine"
    assert (hub.repo["private"], hub.repo["token"], hub.options["commit_message"]) == (True, "t", "first")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    card = hub.files["README.md"].decode()
    for text in ("base's fingerprint", "library_name: peft", f"base_model: {folder}", "- reviews", "50 of "):
        assert text in card, text


def test_a_push_of_several_adapters_gives_each_its_card(hub, classifier):
    _, model = classifier
    model.add_adapter("other", unmask.peft.SelectiveConfig(budget=5, method="pafi", target_modules=["query"]))
    model.push_to_hub("mine")
    cards = [hub.files[name].decode() for name in ("README.md", "other/README.md")]
    assert "id3 (eps 1.0" in cards[0]
    assert "pafi" in cards[1]


@pytest.mark.filterwarnings(r"ignore:Unexpected keyword arguments \['normalise'\]")
def test_an_adapter_of_a_retired_method_can_be_used_and_is_not_trained_further(tmp_path):
    _, expected = saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["normalise"] = config["record"]["method"]["normalise"] = "row-column"
    path.write_text(json.dumps(config))
    again = peft.PeftModel.from_pretrained(travelling(torch.float32), tmp_path)
    assert torch.equal(outputs(again), expected)
    with pytest.raises(MethodError, match="trained with normalise = 'row-column', which unmask no longer has"):
        run(peft.PeftModel.from_pretrained(travelling(torch.float32), tmp_path, is_trainable=True))
