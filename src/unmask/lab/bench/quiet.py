"""What every process of a benchmark does first, whatever its row: what it weighs must not depend on the row's libraries."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PEERS = ("transformers", "peft", "selective_optimizers.wrap")


def import_peers() -> None:
    """Imports those that are installed."""
    for name in PEERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextmanager
def quiet_torch(threads: int) -> Iterator[None]:
    """So many threads, no network, and no advice of the peers' libraries, while it lasts."""
    before, offline = torch.get_num_threads(), os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(peft|transformers|torch)\.")
            yield
    finally:
        torch.set_num_threads(before)
        os.environ.pop("HF_HUB_OFFLINE") if offline is None else os.environ.update(HF_HUB_OFFLINE=offline)
