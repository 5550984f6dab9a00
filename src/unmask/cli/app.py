"""The commands, and what each takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from unmask.cli import sweeps
from unmask.cli.interrupted import InterruptedCommandError
from unmask.version import __version__


class _Commands(typer.core.TyperGroup):
    """The commands; Ctrl-C in one becomes an error of ours, which typer leaves to `unmask.cli.main`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedCommandError from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a network by changing a budget of single scalar weights, and keep the result as a tiny exact delta.",
)


TASK_HELP = (
    "sst2, cola, mrpc, rte, stsb, qnli, qqp, mnli (GLUE); conll2003, wnut17, or ner for tagged sentences of "
    "your own; gsm8k, math10k."
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
    budget: Annotated[str, typer.Option(help="Scalar weights to unmask: a count or a share.")] = "20000",
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 200,
    output: Annotated[
        Path | None, typer.Option(help="Where to keep the delta; default: a folder in the cache.")
    ] = None,
) -> None:
    """Fine-tune a real encoder on real reviews with ID3, on this CPU, in under three minutes."""
    from unmask.cli.demo import run_demo

    run_demo(budget, steps, output)


@app.command()
def train(
    model: Annotated[str | None, typer.Option(help="Base model: a folder or a hub id.")] = None,
    task: Annotated[str | None, typer.Option(help=TASK_HELP)] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the task's files; without it, the hub.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Your training data: csv, tsv, jsonl, parquet, conll, or a hub id.")
    ] = None,
    eval: Annotated[str | None, typer.Option("--eval", help="Your evaluation data; default: a tenth held out.")] = None,
    text: Annotated[str | None, typer.Option(help="Text column.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Second text column.")] = None,
    label: Annotated[str | None, typer.Option(help="Label column.")] = None,
    into: Annotated[
        str | None, typer.Option(help="Select inside an added lora, dora, pfeiffer or houlsby; default: in the base.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="Rank of the LoRA; default 8.")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="The LoRA's scale is alpha / r; default 8.")] = None,
    method: Annotated[str | None, typer.Option(help="See `unmask methods`; default: the recommended recipe.")] = None,
    budget: Annotated[str | None, typer.Option(help="Scalar weights to unmask: 20000, or a share: 0.17%.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per forward.")] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Autocast to bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the head's init, the data order, random masks.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for the delta, metrics and checkpoints.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file of settings; options and --set go over it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting as key=value; see docs/cli.md.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="recommended: the default where no method is named. paper: the paper's settings for the task (its Table 7), "
            "as the second of its four runs: lr 3e-4, of full 7e-6, and seed 7; on word problems lr 3e-4 and seed 42. tuned: "
            "this project's settings for the task. What you give goes over a preset."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue from the newest whole checkpoint in the output, with the settings that the run was started with.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in the output, and start a new one there.")
    ] = False,
) -> None:
    """Train a delta on a known task or on your own data."""
    run_options = ("config", "set_", "preset", "resume", "overwrite")
    given: dict[str, Any] = {
        k: v for k, v in locals().items() if k not in (*run_options, "run_options") and v is not None
    }
    from unmask.files import check_folder
    from unmask.lab.training.recipe import under_preset
    from unmask.lab.training.settings import build, parse_assignments, read_yaml

    settings = (read_yaml(config) if config else {}) | given | parse_assignments(set_ or [])
    resolved = build(under_preset(preset, settings))  # refuse a bad setting before torch is imported
    if output is not None:
        check_folder(output, "--output")
    from unmask.lab.training.training import train as run

    run(resolved, resume=resume, overwrite=overwrite)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    delta: Annotated[
        Path | None, typer.Argument(help="The delta; left out, the base alone solves word problems.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="A task; default: the one that it was trained on. Word problems: gsm8k,svamp,...")
    ] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the task's files; without it, the hub.")] = None,
    data: Annotated[str | None, typer.Option(help="Your evaluation data: csv, tsv, jsonl, parquet, conll.")] = None,
    text: Annotated[str, typer.Option(help="Text column.")] = "text",
    text_pair: Annotated[str | None, typer.Option(help="Second text column.")] = None,
    label: Annotated[str, typer.Option(help="Label column.")] = "label",
    batch_size: Annotated[int, typer.Option(help="Examples per forward.", min=1)] = 64,
    limit: Annotated[int | None, typer.Option(help="Only the first so many word problems of each set.", min=1)] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder of what is generated; default: beside the delta, or under runs.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete what was generated there before.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Of word problems: prompt, max_new_tokens, rule, ...; see docs/tasks.md."),
    ] = None,
) -> None:
    """Evaluate base + delta on a task; outputs of word problems are kept, and a killed evaluation goes on."""
    from unmask.cli.evaluate import run_eval
    from unmask.lab.tasks.protocol import Request
    from unmask.lab.training.settings import parse_assignments

    request = Request(
        task,
        data_dir,
        data,
        text,
        text_pair,
        label,
        limit=limit,
        output=output,
        overwrite=overwrite,
        options=parse_assignments(set_ or []),
    )
    run_eval(model, delta, request, batch_size)


@app.command()
def inspect(
    delta: Annotated[Path, typer.Argument(help="The delta.")],
    top: Annotated[int, typer.Option(help="Rows to show per table.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the allocation too: a .png or .svg file, or no ending for both.")
    ] = None,
) -> None:
    """Show what a delta changes: per layer and module kind, sizes, provenance."""
    from unmask.cli.inspect import run_inspect

    run_inspect(delta, top, as_json, plot)


@app.command()
def apply(
    model: Annotated[str, typer.Argument(help="The base model: a folder or a hub id.")],
    delta: Annotated[Path, typer.Argument(help="The delta.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged checkpoint.")],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run inside a LoRA or adapters: its own library's folder instead.")
    ] = False,
) -> None:
    """Write base + delta as an ordinary checkpoint, or as an ordinary LoRA or adapter."""
    from unmask.cli.apply import run_apply

    run_apply(model, delta, output, adapter)


@app.command()
def delta(
    checkpoint: Annotated[
        Path, typer.Argument(help="RUN/checkpoints/checkpoint-N, or RUN, the output folder of `unmask train`.")
    ],
    step: Annotated[int | None, typer.Option(help="Which checkpoint of RUN; default: the last one.", min=1)] = None,
    output: Annotated[Path | None, typer.Option(help="The file; default: RUN/series/step-N.safetensors.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The run's base model: a folder or a hub id; default: where the run found it.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the checkpoints, and write nothing.")] = False,
) -> None:
    """Write the delta of a checkpoint: one run gives a series of models of smaller budgets."""
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


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help="roberta-base (default), minilm, mpnet, smollm2, llama-1b, llama-7b, a folder or a cached id. Only the "
            "shape counts: weights are random, nothing is downloaded."
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per batch; default: the model's own.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence; default: the model's own.")] = None,
    budget: Annotated[int | None, typer.Option(help="Scalar weights to unmask; default 320000.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default), autocast (to bfloat16), bf16 (weights).")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Rows, comma-separated: frozen, full, full-fused, lora, shira, super, authors, static, static-d3, id3, "
            "id3-10, id3-100 (id3-K: a stride of K), NAME@BUDGET, or all (default)."
        ),
    ] = None,
    draws: Annotated[int | None, typer.Option(help="Fresh processes per method; default 3.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps of each process before the timed ones; default 2.")] = None,
    steps: Annotated[int | None, typer.Option(help="Timed steps of each process, in whole strides; default 3.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default 2.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, or auto (default).")] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Every dropout probability of the model; default: its config's own.")
    ] = None,
    lora_r: Annotated[int | None, typer.Option(help="LoRA's rank; default 8.")] = None,
    curve: Annotated[str | None, typer.Option(help="A curve instead: budget, size or selection.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the results; default runs/bench.")] = None,
) -> None:
    """Measure step time, memory and size on disk against other ways to fine-tune."""
    given = dict(locals())
    import shlex
    import sys

    from unmask.cli.bench import run

    run(given, shlex.join(["unmask", *sys.argv[1:]]))


sweeps.register(app)
