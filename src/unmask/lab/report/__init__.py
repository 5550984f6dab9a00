"""The report of sweeps: one HTML page that needs no network. No torch here."""

from unmask.lab.report.page import page, write_report
from unmask.lab.report.reading import Study, read_study

__all__ = ["Study", "page", "read_study", "write_report"]
