"""``unmask eval``: base + delta on a task."""

from __future__ import annotations

from pathlib import Path

from unmask.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.modeling import load_tuned, task_of
from unmask.predicting import predict
from unmask.tasks import compute, load_evaluation, load_glue
from unmask.tasks.data import Examples, TaskSpec


def run_eval(
    source: str,
    delta_path: Path,
    task: str | None,
    data_dir: str | None,
    data: str | None,
    columns: tuple[str, str | None, str],
    batch_size: int,
) -> None:
    """Prints the metrics of each evaluation split."""
    delta = SparseDelta.load(delta_path)
    trained = task_of(delta)
    spec, splits = _examples(delta, task or (trained["name"] if data is None else None), data_dir, data, columns)
    if spec.num_labels != trained["num_labels"]:
        raise ConfigError(
            f"task {spec.name!r} has {spec.num_labels} labels; the delta was trained with {trained['num_labels']}."
        )
    model, tokenizer = load_tuned(source, delta)
    for name, examples in splits.items():
        scores = predict(model, tokenizer, examples, int(trained["max_length"]), batch_size)
        metrics = compute(spec, scores, examples.labels)
        print(f"{name} ({len(examples):,}): " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))


def _examples(
    delta: SparseDelta, task: str | None, data_dir: str | None, data: str | None, columns: tuple[str, str | None, str]
) -> tuple[TaskSpec, dict[str, Examples]]:
    if data is None:
        loaded = load_glue(str(task), data_dir, need_train=False)
        return loaded.spec, dict(loaded.evals)
    if task is not None:
        raise ConfigError("give either --task or --data, not both.")
    trained = task_of(delta)
    names = trained["label_names"]
    spec = TaskSpec(
        trained["name"],
        tuple(trained["text_columns"]),
        trained["num_labels"],
        tuple(names) if names else None,
        ("accuracy",) if trained["num_labels"] > 1 else ("pearson", "spearman", "mse"),
        "accuracy" if trained["num_labels"] > 1 else "pearson",
    )
    text, pair, label = columns
    return spec, {"eval": load_evaluation(spec, data, text, label, pair)}
