"""Checks that the core needs torch, numpy and safetensors alone, and imports torch late."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import unmask

BLOCKED = (
    "transformers", "peft", "accelerate", "datasets", "huggingface_hub", "tokenizers", "sklearn", "scipy", "typer", "rich",
    "yaml", "matplotlib", "pandas", "bitsandbytes", "torchao",
)  # fmt: skip

BLOCK = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))  # None: an import of it fails\n"

TRAIN = """
import tempfile, torch, unmask
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
for method in (unmask.id3(6, steps=2), unmask.repeat_d3(6), unmask.pafi(6), unmask.bitfit(), unmask.full(),
               unmask.fish(6, [torch.ones(2, 4)], loss=lambda m, b: m(b).square().mean())):
    selection = unmask.select(model, method)
    optimizer = torch.optim.AdamW(selection.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert selection.used == selection.budget
    path = tempfile.mkdtemp() + "/delta.safetensors"
    selection.delta().save(path)
    selection.release()
    model.load_state_dict(base)
    unmask.SparseDelta.load(path).apply(model)
    assert any(not torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict(base)
"""

NEED = """
import pytest, unmask
from unmask.errors import need
with pytest.raises(unmask.MissingExtraError, match=r"pip install 'unmask\\[eval\\]'"):
    need("sklearn.metrics", "eval")
with pytest.raises(ModuleNotFoundError, match="no_such_part"):
    need("json.no_such_part", "eval")
"""

LAZY = """
import sys, unmask
assert "torch" not in sys.modules
assert set(unmask.__all__) <= set(dir(unmask))
assert all(getattr(unmask, name) is not None for name in unmask.__all__)
assert "torch" in sys.modules
"""

PACKAGES = """
import sys, unmask
assert hasattr(unmask, "analysis") and unmask.analysis is sys.modules["unmask.analysis"]
assert hasattr(unmask, "quantised") and hasattr(unmask, "methods") and not hasattr(unmask, "nothing")
assert {"analysis", "peft", "quantised"} <= set(dir(unmask))
"""

STAR = """
from unmask import *
import unmask
assert set(unmask.__all__) <= set(globals())
assert id3(3, steps=5) == unmask.id3(3, steps=5)
"""

METHODS = """
import importlib, pkgutil, sys
import unmask.methods
for module in pkgutil.iter_modules(unmask.methods.__path__):
    importlib.import_module(f"unmask.methods.{module.name}")
import unmask
unmask.id3("0.17%", steps=9), unmask.sparse_adapter(5, "magnitude"), unmask.Scope.patterns("a"), unmask.PRESETS
assert "torch" not in sys.modules and "numpy" not in sys.modules
"""


def python(code):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_saving_and_applying_without_any_extra():
    python(BLOCK + TRAIN)


def test_a_missing_extra_is_named():
    python(BLOCK + NEED)


def test_packages_are_attributes_before_they_are_imported():
    python(PACKAGES)


def test_all_public_names_can_be_imported_at_once():
    python(STAR)


def test_methods_are_composed_without_torch():
    python(METHODS)


def test_type_checkers_see_the_public_names():
    """Checks that the stub has the public names, and takes the presets from their module."""
    tree = ast.parse((Path(unmask.__file__).with_name("__init__.pyi")).read_text())
    lines = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    stars = [node.module for node in lines if node.names[0].name == "*"]
    assert stars == ["unmask.methods.presets"]
    named = {alias.asname: node.module for node in lines for alias in node.names if alias.name != "*"}
    packages = {name for name, module in named.items() if module == "unmask"}
    assert packages == set(dir(unmask)) - set(unmask.__all__)
    defined = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert defined == {"__version__"}
    assert (set(named) | defined) - packages == set(unmask.__all__) - set(unmask.PRESETS) - {"PRESETS"}
    for name, module in named.items():
        assert getattr(import_module(module), name, None) is not None or name in packages


def test_every_public_name_exists_and_torch_is_imported_on_first_use():
    python(LAZY)
