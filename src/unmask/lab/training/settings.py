"""Reads a run's configuration from a YAML file or from texts of the command line, and writes it back."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from unmask.errors import ConfigError, need
from unmask.files import write_text
from unmask.lab.tasks.names import TASKS
from unmask.lab.training.config import TrainConfig
from unmask.lab.training.fields import converted
from unmask.reading import DEEPEST, Malformed, bounded, read_text, refusing, shown


def build(values: Mapping[str, Any]) -> TrainConfig:
    """Builds a configuration from plain values or texts, after the files of ``plugin`` have run, once in a process.

    Raises:
        ConfigError: A setting is not known, one is missing, or a value is not allowed.

    Example:
        >>> build({"model": "m", "output": "o", "task": "sst2", "budget": "1%", "lr": "3e-4"}).lr
        0.0003
    """
    task = values.get("task")
    word_problems = isinstance(task, str) and TASKS.get(task) == "generation"
    defaults = {"max_length": 512} if word_problems else {}  # a solution is longer than a sentence
    settings = converted(TrainConfig, {**defaults, **values})
    for path in settings.get("plugin", ()):
        _run_plugin(str(Path(path).resolve()))
    return TrainConfig(**settings)


@functools.cache
def _run_plugin(path: str) -> None:
    """Runs a Python file of the user's. The cache keeps a second configuration in this process from running it again."""
    if not path.endswith(".py") or not Path(path).is_file():
        raise ConfigError(f"plugin = {path!r} is not a Python file; give the path of a .py file.")
    try:
        runpy.run_path(path, run_name=f"unmask_plugin_{Path(path).stem}")
    except Exception as error:
        raise ConfigError(f"the plugin {path!r} failed: {type(error).__name__}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads settings from a YAML file: a mapping whose keys are texts.

    Raises:
        ConfigError: There is no such file, it is not a mapping, or it is too large or nested too deeply for settings.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no configuration file {str(path)!r}.")
    with refusing(ConfigError, repr(str(path))):
        values = parse_yaml(read_text(path))
        if not isinstance(values, dict):
            raise Malformed(f"it must hold a mapping of settings (lr: 0.001), not a {type(values).__name__}")
        for key in values:
            if not isinstance(key, str):
                raise Malformed(f"the setting {shown(key)} must have a text as its name")
    return values


MOST_YAML = 2**20
"""The largest number of characters in a YAML text that is read."""
_MOST_MERGED = 10_000


def parse_yaml(text: str) -> Any:
    """Returns the value of a YAML text. Its size and depth are bounded, also after aliases and merge keys are resolved.

    Raises:
        Malformed: The text is not YAML, or it is too large or nested too deeply for settings.

    Example:
        >>> parse_yaml("lr: 0.001")
        {'lr': 0.001}
    """
    yaml = need("yaml", "cli")
    if len(text) > MOST_YAML:
        raise Malformed(f"it has {len(text):,} characters of YAML; at most {MOST_YAML:,} are read")

    plain: Any = yaml.SafeLoader

    class Loader(plain):
        """A loader that refuses deep nesting, and merge keys (``<<``) that multiply from level to level: both take very long."""

        def fetch_flow_collection_start(self, kind: Any) -> None:
            if self.flow_level >= DEEPEST:
                raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels")
            super().fetch_flow_collection_start(kind)

        def flatten_mapping(self, node: Any) -> None:
            held = 0
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(part, yaml.MappingNode):
                            self.flatten_mapping(part)
                            held += len(part.value)
                        if held > _MOST_MERGED:
                            raise yaml.YAMLError(f"its merge keys bring in more than {_MOST_MERGED:,} entries")
            super().flatten_mapping(node)

    try:
        return bounded(yaml.load(text, Loader))
    except Malformed:
        raise
    except RecursionError as error:
        raise Malformed("it is nested too deeply") from error
    except Exception as error:  # the library raises many classes, and always because of the text
        raise Malformed(f"it is not valid YAML: {error}") from error


def write_yaml(config: TrainConfig, path: Path) -> None:
    """Writes the resolved configuration; `read_yaml` and `build` give it back."""
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    write_text(path, need("yaml", "cli").safe_dump(plain, sort_keys=False))


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Returns ``--set key=value`` texts as a mapping.

    Raises:
        ConfigError: A text has no equals sign.

    Example:
        >>> parse_assignments(["lr=1e-3", "include=query,value"])
        {'lr': '1e-3', 'include': 'query,value'}
    """
    pairs = {}
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign:
            raise ConfigError(f"--set {assignment!r}: write key=value.")
        pairs[key.strip()] = value.strip()
    return pairs
