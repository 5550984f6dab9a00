"""Runs PEFT's own tests for custom models with unmask's method, and counts the outcomes by test.

    pip download --no-binary :all: --no-deps peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python tests/environments/peft_own/run.py peft-0.21.2/tests [pytest's arguments]

From ``test_custom_models.py`` it runs the tests that PEFT runs with every method, with the cases below in place of PEFT's
list. This repository holds no code of PEFT's. docs/peft.md says which tests fail, and why.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import types
from collections import Counter, defaultdict
from pathlib import Path

import pytest

import unmask.peft

BUDGETED = {"budget": 8, "total_steps": 3}
CASES = [
    ("MLP, one layer", "MLP", {"target_modules": "lin0"}),
    ("MLP, a list", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP, all-linear", "MLP", {"target_modules": "all-linear"}),
    ("MLP, a layer saved whole", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP, PaFi", "MLP", {"target_modules": ["lin0"], "method": "pafi"}),
    ("MLP, repeated", "MLP", {"target_modules": ["lin0"], "method": "repeat_d3"}),
    ("LayerNorm", "MLP_LayerNorm", {"target_modules": ["layernorm0"]}),
    ("Embedding and Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Conv1d", "Conv1d", {"target_modules": ["conv1d"], "budget": 3}),
    ("Conv2d", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d, groups", "Conv2dGroups", {"target_modules": ["conv2d"]}),
    ("Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
    ("MultiheadAttention", "MHA", {"target_modules": ["mha"]}),
]


class Plugin:
    """Replaces PEFT's list of cases, keeps the tests that take them, and counts outcomes."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.reasons: dict[str, Counter] = defaultdict(Counter)

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, collector: pytest.Collector, name: str) -> None:
        cases = getattr(getattr(collector, "obj", None), "TEST_CASES", None)
        if isinstance(cases, list) and (not cases or cases[0][2] is not unmask.peft.SelectiveConfig):
            rows = [(title, model, unmask.peft.SelectiveConfig, {**BUDGETED, **given}) for title, model, given in CASES]
            cases[:] = rows  # it changes in place, because the tests' parametrization holds this list
            # A selective adapter sets no weight at first, and has no setting for that.
            collector.obj.set_init_weights_false = lambda config_cls, kwargs: kwargs

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        taken = [
            i for i in items if i.parent.name == "TestPeftCustomModel" and _config(i) is unmask.peft.SelectiveConfig
        ]
        items[:] = taken

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        test = report.nodeid.split("::")[-1].split("[")[0]
        self.counts[test][report.outcome] += 1
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons[test][str(crash.message if crash else report.longrepr).splitlines()[0][:150]] += 1


def _config(item: pytest.Item) -> object:
    return getattr(item, "callspec", None) and item.callspec.params.get("config_cls")


def _stand_in() -> None:
    """Registers a stand-in for diffusers, which PEFT's helpers import for tests that are not run here."""
    module = types.ModuleType("diffusers")
    module.StableDiffusionPipeline = object  # type: ignore[attr-defined]
    sys.modules.setdefault("diffusers", module)


def main(folder: str, *arguments: str) -> None:
    plugin = Plugin()
    _stand_in()
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary, "peft_tests")
        package.mkdir()
        (package / "__init__.py").touch()
        for name in ("test_custom_models.py", "testing_common.py", "testing_utils.py"):
            shutil.copy(Path(folder, name), package)
        settings = ["-q", "--no-header", "--no-summary", "--tb=short", "-p", "no:cacheprovider", "-c", "/dev/null"]
        file = str(package / "test_custom_models.py")
        pytest.main([*settings, "--rootdir", temporary, file, *arguments], plugins=[plugin])
    total: Counter = Counter()
    for test, counts in sorted(plugin.counts.items()):
        total += counts
        print(f"{test}: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
        for reason, count in plugin.reasons[test].most_common():
            print(f"    {count} x {reason}")
    print("in all: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(total.items())))


if __name__ == "__main__":
    main(*sys.argv[1:])
