"""Writes the report of sweeps: one HTML page that needs no network. It imports no torch."""

from unmask.lab.report.page import page, write_report
from unmask.lab.report.reading import Study, read_study

__all__ = ["Study", "page", "read_study", "write_report"]
