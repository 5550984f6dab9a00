"""The options of ``unmask sweep``, ``reproduce`` and ``report``. Their work is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workers = Annotated[int, typer.Option(help="The number of worker processes; several can share a GPU.", min=1)]
Threads = Annotated[
    int | None,
    typer.Option(help="CPU threads of each worker; without it the cores are shared out.", min=1),
]
Devices = Annotated[str | None, typer.Option(help="The GPUs for the workers in turn, as CUDA numbers: 0,1.")]
Engine = Annotated[str, typer.Option(help="local: processes on this machine; ray: tasks on a Ray cluster (extra ray).")]
Axis = Annotated[list[str] | None, typer.Option(help="Other values of an axis: --axis task=mrpc,rte --axis seed=0,1.")]
Only = Annotated[list[str] | None, typer.Option(help="Run some methods or values only: --only method=id3,pafi.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of every run: --set max_steps=100.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="List the runs in order, and run nothing.")]
Retry = Annotated[bool, typer.Option("--retry-failed", help="Do failed runs again.")]
DataDir = Annotated[str | None, typer.Option(help="The folder with the tasks' files; without it, the hub.")]


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file; see docs/reproduce.md.")],
    output: Annotated[Path, typer.Option(help="The folder for results; runs that are done there are not done again.")],
    model: Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")] = None,
    data_dir: DataDir = None,
    workers: Workers = 1,
    threads: Threads = None,
    devices: Devices = None,
    engine: Engine = "local",
    axis: Axis = None,
    only: Only = None,
    set_: Set = None,
    dry_run: DryRun = False,
    retry_failed: Retry = False,
) -> None:
    """Run a grid of trainings from a YAML file; stop it and start it again as you like."""
    from unmask.cli.sweeping import Options, go
    from unmask.lab.study.parsing import read_sweep

    go(read_sweep(file), output, Options.among(locals()))


def reproduce(
    name: Annotated[str, typer.Argument(help="table1 to table5, fig1, fig4 to fig9.")],
    model: Annotated[str, typer.Option(help="The base model: a folder or a hub id.")],
    data_dir: DataDir = None,
    scale: Annotated[str, typer.Option(help="full: the paper's runs; small: a few steps of each, to try it.")] = "full",
    preset: Annotated[
        str,
        typer.Option(
            help="paper: the paper's settings, learning rates, seeds and protocol (its Table 7); tuned: this project's own."
        ),
    ] = "paper",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper: four runs, each learning rate with another seed, of which the best three count. seeds: the rate "
            "is chosen on the first seed, and all seeds count, with an interval. both: the runs of both. Default: the preset's."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/reproduce/NAME-SCALE[-tuned].")] = None,
    workers: Workers = 1,
    threads: Threads = None,
    devices: Devices = None,
    engine: Engine = "local",
    axis: Axis = None,
    only: Only = None,
    set_: Set = None,
    dry_run: DryRun = False,
    retry_failed: Retry = False,
) -> None:
    """Run a table or a figure of the paper on your model."""
    from unmask.cli.sweeping import Options, go, with_protocol
    from unmask.lab.study.paper import load

    loaded = with_protocol(load(name, scale, preset), protocol)  # type: ignore[arg-type]  # checked by load
    folder = Path("runs", "reproduce", "-".join([name, scale, *([] if preset == "paper" else [preset])]))
    go(loaded, output or folder, Options.among(locals()))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of sweeps, or of runs of `unmask train`.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one HTML page with the tables, figures and runs of sweeps."""
    from unmask.files import check_file
    from unmask.lab.report import write_report

    path = write_report(runs, check_file(output, "--output"))
    print(f"report in {path} ({path.stat().st_size:,} bytes)")
