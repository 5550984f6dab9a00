"""Kinds of task: what differs between runs that classify texts and runs that do something else."""

from unmask.kinds.protocol import Kind, Prepared, Request, Scored, Task
from unmask.kinds.registry import KINDS, kind_for, kind_of

__all__ = ["KINDS", "Kind", "Prepared", "Request", "Scored", "Task", "kind_for", "kind_of"]
