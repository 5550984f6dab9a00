"""Tests `unmask diff` and `unmask apply` of its deltas as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file, save_file

from unmask import SparseDelta


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"of": folder.name}))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Makes a folder with ``base`` and ``tuned``, which differ in 20 weights, one added, one removed and one replaced tensor."""
    base = {
        "a.weight": torch.randn(100, 100),
        "b.weight": torch.randn(50),
        "gone": torch.zeros(2),
        "head": torch.zeros(2),
    }
    tuned = {
        "a.weight": base["a.weight"].clone(),
        "b.weight": base["b.weight"],
        "new": torch.ones(4),
        "head": torch.zeros(3),
    }
    tuned["a.weight"][:20, 7] += 1
    write(tmp_path / "base", base)
    write(tmp_path / "tuned", tuned)
    return tmp_path


def test_diff_writes_the_delta_and_says_what_changed_and_apply_gives_the_tuned_tensors(world):
    printed = run("diff", "base", "tuned", "--output", "d.safetensors", cwd=world).stdout
    size = (world / "d.safetensors").stat().st_size
    assert "tensors: 1 of 4 changed (1 held in part, 0 whole)" in printed
    assert "added: 1 (new)\nremoved: 1 (gone)\nreplaced: 1 (head)\n" in printed
    assert "weights: 20 of 10,057 held one by one (density 0.1989%), 7 in whole tensors" in printed
    assert f"size: {size:,} bytes; a dense copy has 40,228 ({size / 40228:.2%})" in printed
    assert "note" not in printed
    printed = run("apply", "base", "d.safetensors", "--output", "out", cwd=world).stdout
    assert "20 weights and 2 whole tensors applied to base; checkpoint in out" in printed
    assert "config.json is the base's, and the tuned checkpoint has other tensors; take it from tuned" in printed
    found, expected = (load_file(world / folder / "model.safetensors") for folder in ("out", "tuned"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((world / "out" / "config.json").read_text()) == {"of": "base"}
    shown = " ".join(run("inspect", "d.safetensors", cwd=world).stdout.split())
    assert (
        "made from two checkpoints; the tuned one is 'tuned' (tensors: 1 added, 1 removed, 1 replaced, 0 tied)" in shown
    )


def test_diff_says_when_a_dense_copy_is_smaller_or_nothing_differs(world):
    write(world / "other", {"a.weight": torch.randn(3, 3)})
    write(world / "another", {"a.weight": torch.randn(3, 3)})
    printed = run("diff", "other", "another", "--output", "d.safetensors", cwd=world).stdout
    assert "note: a dense copy is smaller than this delta" in printed
    write(world / "same", load_file(world / "base" / "model.safetensors"))
    printed = run("diff", "base", "same", "--output", "e.safetensors", cwd=world).stdout
    assert "note: the two checkpoints hold the same tensors, bit for bit" in printed
    assert len(SparseDelta.load(world / "e.safetensors")) == 0


def test_what_cannot_work_is_refused_and_leaves_nothing(world):
    run("diff", "base", "tuned", "--output", "d.safetensors", cwd=world)
    (world / "full").mkdir()
    (world / "full" / "x").touch()
    for words, message in (
        (("diff", "base", "tuned", "--output", "d.safetensors"), "exists already; give another --output"),
        (("diff", "base", "base", "--output", "e.safetensors"), "give two"),
        (("diff", "base", "./absent", "--output", "e.safetensors"), "there is no checkpoint at './absent'"),
        (("apply", "tuned", "d.safetensors", "--output", "out"), "'tuned' is not the delta's base"),
        (("apply", "base", "d.safetensors", "--output", "full"), "is not empty"),
        (("apply", "base", "d.safetensors", "--output", "out", "--adapter"), "leave --adapter out"),
    ):
        done = run(*words, cwd=world, check=False)
        assert done.returncode == 1
        assert message in done.stderr
    assert sorted(path.name for path in world.iterdir()) == ["base", "d.safetensors", "full", "tuned"]


def test_diff_and_apply_need_no_transformers(world):
    code = (
        "import sys\nfrom unmask.cli import main\n"
        "for words in (['diff', 'base', 'tuned'], ['apply', 'base', 'd.safetensors']):\n"
        "    sys.argv = ['unmask', *words, '--output', 'd.safetensors' if words[0] == 'diff' else 'out']\n"
        "    try:\n        main()\n    except SystemExit as end:\n        assert not end.code\n"
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=world, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert (world / "out" / "model.safetensors").is_file()
