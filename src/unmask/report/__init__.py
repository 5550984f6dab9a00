"""The report of sweeps: one HTML page that needs no network. No torch here."""

from unmask.report.page import page, write_report
from unmask.report.reading import Study, read_study

__all__ = ["Study", "page", "read_study", "write_report"]
