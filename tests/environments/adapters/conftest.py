"""Skips these tests where the `adapters` library is missing; `make test-adapters` runs them in a separate environment."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("adapters") is None:
    collect_ignore_glob = ["test_*.py"]
