"""These tests need the `adapters` library, in an environment of its own: `make test-adapters`."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("adapters") is None:
    collect_ignore_glob = ["test_*.py"]
