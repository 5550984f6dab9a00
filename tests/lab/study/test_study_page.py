"""Tests that the page with the study's tables holds what the study's command prints from its runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT

STUDY = ROOT / "experiments" / "study"


@pytest.mark.skipif(not STUDY.exists(), reason="this is not a checkout")
def test_the_page_holds_the_tables_of_the_runs():
    command = [sys.executable, str(STUDY / "tables.py"), "--from", str(STUDY / "runs.csv")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (STUDY / "tables.md").read_text("utf-8")
    assert printed.startswith("## SST-2, MiniLM, 0.05% (chosen on)\n")
    assert page.endswith(printed)
