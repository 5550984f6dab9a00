"""Holds what runs experiments: tasks, training runs, studies, figures, reports and benchmarks. Only ``unmask.cli`` imports it."""
