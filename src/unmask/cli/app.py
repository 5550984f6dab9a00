"""The commands of ``unmask`` and their options. Their work is imported when they run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from unmask import __version__
from unmask.cli.options import SettingsCommand, SweepOptions
from unmask.errors import UnmaskError
from unmask.lab.training.fields import converted


class InterruptedCommandError(UnmaskError):
    """Says that Ctrl-C has ended a command before it was done."""

    def __init__(self) -> None:
        super().__init__("interrupted before it was done; files that were whole before are kept.")


class _Commands(typer.core.TyperGroup):
    """The group of commands. Ctrl-C becomes an error of this project, which typer leaves to `unmask.cli.main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedCommandError from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a network by changing a budget of single scalar weights, and keep the result as a tiny exact delta.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"unmask {__version__}")
        raise typer.Exit


@app.callback()
def _options(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False) -> None:
    pass


@app.command()
def demo(
    budget: Annotated[str, typer.Option(help="The number of scalar weights to unmask: a count or a share.")] = "20000",
    steps: Annotated[int, typer.Option(help="The number of optimizer steps.", min=1)] = 200,
    output: Annotated[Path | None, typer.Option(help="The folder for the delta; without it, one in the cache.")] = None,
) -> None:
    """Fine-tune a real encoder on real reviews with ID3, on this CPU, in under three minutes."""
    from unmask.cli.demo import run_demo

    run_demo(budget, steps, output)


class _TrainCommand(SettingsCommand):
    settings = ("unmask.lab.training.config", "TrainConfig")


@app.command(cls=_TrainCommand)
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; options and --set go over it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting, key=value, as in the YAML file.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="recommended: the recipe, which is the default where no method is named. paper: the paper's settings for the "
            "task (its Table 7), as the second of its four runs: lr 3e-4, of full 7e-6, and seed 7; on word problems lr 3e-4 "
            "and seed 42. tuned: this project's settings for the task. What you give goes over a preset."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue from the output's newest whole checkpoint with the run's settings."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output by a new one.")] = False,
) -> None:
    """Train a delta on a known task or on your own data."""
    from unmask.files import check_folder
    from unmask.lab.training.paper import under_preset
    from unmask.lab.training.settings import build, parse_assignments, read_yaml

    settings = (read_yaml(config) if config else {}) | context.obj | parse_assignments(set_ or [])
    resolved = build(under_preset(preset, settings))  # a bad setting is refused before torch is imported
    if "output" in context.obj:
        check_folder(resolved.output, "--output")
    from unmask.lab.training.training import train as run

    run(resolved, resume=resume, overwrite=overwrite)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    delta: Annotated[
        Path | None,
        typer.Argument(
            help="The delta file; without it the checkpoint's own head is scored, or word problems are solved."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task; without it, the delta's own. Word problems: gsm8k,svamp,...")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="The folder with the task's files; without it, the hub.")] = None,
    data: Annotated[str | None, typer.Option(help="Your own data: csv, tsv, jsonl, json, parquet, conll.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; without it, the one that was trained on.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text column, likewise.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column, likewise.")] = None,
    delimiter: Annotated[str | None, typer.Option(help="The character between two cells of a csv or tsv file.")] = None,
    encoding: Annotated[str | None, typer.Option(help="The encoding of the file.")] = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out rows that lack a text or a label.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="The longest input in tokens; without it, that of the training.", min=1)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="The number of examples per forward pass.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Solve only so many word problems of each set.", min=1)] = None,
    output: Annotated[
        str | None, typer.Option(help="The folder for generated texts; without it, next to the delta or under runs.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the texts generated there before.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of word problems, such as rule=last (docs/tasks.md).")
    ] = None,
) -> None:
    """Evaluate base + delta, or a checkpoint with a trained head, on a task.

    A file of your own is read as the one that was trained on. Outputs of word problems are kept, so that a killed evaluation
    can go on.
    """
    from unmask.cli.evaluate import run_eval
    from unmask.lab.tasks.protocol import Request
    from unmask.lab.training.settings import parse_assignments

    options = parse_assignments(set_ or [])
    source = (task, data_dir, data, text, text_pair, label, delimiter, encoding, drop_missing)
    request = Request(*source, limit=limit, output=output, overwrite=overwrite, options=options)
    run_eval(model, delta, request, batch_size, max_length)


@app.command()
def inspect(
    delta: Annotated[Path, typer.Argument(help="The delta file, or the output folder of `unmask train`.")],
    top: Annotated[int, typer.Option(help="The number of rows to show per table.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the allocation too, into a .png or .svg file, or without an ending both.")
    ] = None,
) -> None:
    """Show what a delta changes: per layer and module kind, sizes, provenance."""
    from unmask.cli.inspect import run_inspect

    run_inspect(delta, top, as_json, plot)


@app.command()
def diff(
    base: Annotated[str, typer.Argument(help="The base checkpoint: a folder, a .safetensors file or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="The tuned checkpoint, in one of the same forms.")],
    output: Annotated[Path, typer.Option(help="The file for the delta.")],
) -> None:
    """Write the delta between two checkpoints of any origin: what must change in BASE to get TUNED, bit for bit."""
    from unmask.cli.diff import run_diff

    run_diff(base, tuned, output)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    delta: Annotated[Path, typer.Argument(help="The delta file.")],
    output: Annotated[Path, typer.Option(help="The folder for the merged checkpoint.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Write an ordinary LoRA or adapter folder (of a run inside one).")
    ] = False,
) -> None:
    """Write base + delta as an ordinary checkpoint, or as an ordinary LoRA or adapter."""
    from unmask.cli.apply import run_apply

    run_apply(model, delta, output, adapter)


@app.command()
def delta(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="RUN/checkpoints/checkpoint-N, RUN, the output folder of `unmask train`, or RUN/ladder.safetensors."
        ),
    ],
    step: Annotated[int | None, typer.Option(help="The step of the checkpoint; without it, the last.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="The file; without it, RUN/series/step-N.safetensors.")] = None,
    base: Annotated[str | None, typer.Option(help="The base (a folder or a hub id); without it, the run's.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the checkpoints, and write nothing.")] = False,
) -> None:
    """Write the delta of a checkpoint or of a ladder's rung: one run gives a series of models of smaller budgets."""
    from unmask.cli.series import list_checkpoints, write_delta

    if list_:
        list_checkpoints(checkpoint, given={"--step": step, "--output": output, "--base": base})
    else:
        write_delta(checkpoint, step, output, base)


@app.command()
def methods() -> None:
    """List the methods."""
    from unmask.cli.methods import run_methods

    run_methods()


class _BenchCommand(SettingsCommand):
    settings = ("unmask.lab.bench.settings", "BenchSettings")


@app.command(cls=_BenchCommand)
def bench(context: typer.Context) -> None:
    """Measure step time, memory and size on disk against other ways to fine-tune."""
    from unmask.cli.bench import run

    run(context.obj, shlex.join(["unmask", *sys.argv[1:]]))


class _SweepCommand(SettingsCommand):
    settings = ("unmask.cli.options", "SweepOptions")


_Axis = Annotated[list[str] | None, typer.Option(help="Other values of an axis: --axis task=mrpc,rte --axis seed=0,1.")]
_Only = Annotated[list[str] | None, typer.Option(help="Run some methods or values only: --only method=id3,pafi.")]
_Set = Annotated[list[str] | None, typer.Option("--set", help="A setting of every run: --set max_steps=100.")]


@app.command(cls=_SweepCommand)
def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="The sweep's YAML file; see docs/reproduce.md.")],
    output: Annotated[Path, typer.Option(help="The folder for results; runs that are done there are not done again.")],
    model: Annotated[str | None, typer.Option(help="The base model: a folder or a hub id.")] = None,
    axis: _Axis = None,
    only: _Only = None,
    set_: _Set = None,
) -> None:
    """Run a grid of trainings from a YAML file; stop it and start it again as you like."""
    from unmask.cli.sweeping import changed, go
    from unmask.lab.study.parsing import read_sweep

    options = SweepOptions(**converted(SweepOptions, context.obj))
    go(changed(read_sweep(file), axis, only, set_, model=model, data_dir=options.data_dir), output, options)


@app.command(cls=_SweepCommand)
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
    axis: _Axis = None,
    only: _Only = None,
    set_: _Set = None,
) -> None:
    """Run a table or a figure of the paper on your model."""
    from unmask.cli.sweeping import changed, go, with_protocol
    from unmask.lab.study.paper import load

    options = SweepOptions(**converted(SweepOptions, context.obj))
    loaded = with_protocol(load(name, scale, preset), protocol)  # type: ignore[arg-type]  # checked by load
    folder = Path("runs", "reproduce", "-".join([name, scale, *([] if preset == "paper" else [preset])]))
    go(changed(loaded, axis, only, set_, model=model, data_dir=options.data_dir), output or folder, options)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of sweeps, or of runs of `unmask train`.")],
    output: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
) -> None:
    """Write one HTML page with the tables, figures and runs of sweeps."""
    from unmask.files import check_file
    from unmask.lab.report import write_report

    path = write_report(runs, check_file(output, "--output"))
    print(f"report in {path} ({path.stat().st_size:,} bytes)")
