"""Figures of runs, drawn from plain records. matplotlib (extra ``plot``) is imported when a figure is drawn."""

from unmask.figures.records import AllocationRow, CurvePoint, RunRecord, Snapshot

__all__ = ["AllocationRow", "CurvePoint", "RunRecord", "Snapshot"]
