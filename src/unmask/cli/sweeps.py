"""The options of ``unmask sweep``, ``reproduce`` and ``report``. Their work is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from unmask.cli.options import SettingsCommand, SweepOptions
from unmask.lab.training.fields import converted


class SweepCommand(SettingsCommand):
    """A command with `SweepOptions`."""

    settings = ("unmask.cli.options", "SweepOptions")


Axis = Annotated[list[str] | None, typer.Option(help="Other values of an axis: --axis task=mrpc,rte --axis seed=0,1.")]
Only = Annotated[list[str] | None, typer.Option(help="Run some methods or values only: --only method=id3,pafi.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of every run: --set max_steps=100.")]


def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file; see docs/reproduce.md.")],
    output: Annotated[Path, typer.Option(help="The folder for results; runs that are done there are not done again.")],
    model: Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")] = None,
    axis: Axis = None,
    only: Only = None,
    set_: Set = None,
) -> None:
    """Run a grid of trainings from a YAML file; stop it and start it again as you like."""
    from unmask.cli.sweeping import changed, go
    from unmask.lab.study.parsing import read_sweep

    options = SweepOptions(**converted(SweepOptions, context.obj))
    go(changed(read_sweep(file), axis, only, set_, model=model, data_dir=options.data_dir), output, options)


def reproduce(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="table1 to table5, fig1, fig4 to fig9.")],
    model: Annotated[str, typer.Option(help="The base model: a folder or a hub id.")],
    scale: Annotated[str, typer.Option(help="full: the paper's runs; small: a few steps of each, to try it.")] = "full",
    preset: Annotated[
        str, typer.Option(help="paper: the paper's settings, seeds and protocol (its Table 7); tuned: this project's.")
    ] = "paper",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="paper: four runs, each learning rate with another seed, of which the best three count. seeds: the rate "
            "is chosen on the first seed, and all seeds count, with an interval. both: the runs of both. Default: the preset's."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/reproduce/NAME-SCALE[-tuned].")] = None,
    axis: Axis = None,
    only: Only = None,
    set_: Set = None,
) -> None:
    """Run a table or a figure of the paper on your model."""
    from unmask.cli.sweeping import changed, go, with_protocol
    from unmask.lab.study.paper import load

    options = SweepOptions(**converted(SweepOptions, context.obj))
    loaded = with_protocol(load(name, scale, preset), protocol)  # type: ignore[arg-type]  # checked by load
    folder = Path("runs", "reproduce", "-".join([name, scale, *([] if preset == "paper" else [preset])]))
    go(changed(loaded, axis, only, set_, model=model, data_dir=options.data_dir), output or folder, options)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of sweeps, or of runs of `unmask train`.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one HTML page with the tables, figures and runs of sweeps."""
    from unmask.files import check_file
    from unmask.lab.report import write_report

    path = write_report(runs, check_file(output, "--output"))
    print(f"report in {path} ({path.stat().st_size:,} bytes)")
