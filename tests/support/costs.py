"""Forges the costs that `unmask.gradients.choice` reads from the user's cache: its choices are then the same on any machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from unmask.files import cache_folder, write_json
from unmask.gradients.choice import Cost, _costs, cache_file

EPYC = {  # measured on an AMD EPYC with AVX-512 and bfloat16 instructions, 2 threads; float64 scaled from float32
    torch.float64: Cost(call=5e3, dense=0.02, select=1.5, start=3e4, transpose=0.6, dot=0.13),
    torch.float32: Cost(call=5e3, dense=0.0105, select=0.8, start=3e4, transpose=0.27, dot=0.065),
    torch.bfloat16: Cost(call=5e3, dense=0.0027, select=2.8, start=3e4, transpose=0.3, dot=0.06),
    torch.float16: Cost(call=5e3, dense=0.0027, select=2.8, start=3e4, transpose=0.3, dot=0.06),
}


def forge(table: Mapping[torch.dtype, Cost], folder: Path) -> None:
    """Puts a table into the user's cache, which is ``folder`` from now on, for this process and its children."""
    os.environ["UNMASK_CACHE"] = str(folder)
    for dtype, cost in table.items():
        for threads in {1, 2, torch.get_num_threads()}:
            write_json(cache_file(torch.device("cpu"), dtype, threads), asdict(cost))
    _costs.cache_clear()


def forge_for_session() -> tempfile.TemporaryDirectory:
    """Forges the costs of an EPYC; they last as long as the folder that is returned. The rest of the user's cache is linked."""
    folder, usual = tempfile.TemporaryDirectory(prefix="unmask-cache-"), cache_folder()
    for path in usual.iterdir() if usual.is_dir() else ():
        if path.name != "costs":
            Path(folder.name, path.name).symlink_to(path)
    forge(EPYC, Path(folder.name))
    return folder
