"""``unmask apply``: writes base + delta as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

from unmask.delta.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.files import check_folder


def run_apply(source: str, delta_path: Path, output: Path, adapter: bool = False) -> None:
    """Writes the tuned model, or the LoRA or adapter alone, to a new folder.

    A delta of two checkpoints is applied to the base's files. One of a training is applied to the model, with transformers.
    """
    check_folder(output, "--output")
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{str(output)!r} is not empty; give a new folder.")
    delta = SparseDelta.load(delta_path)
    if delta.provenance.between is None:
        _apply_to_model(source, delta, output, adapter)
    elif adapter:
        raise ConfigError(
            "the delta was made from two checkpoints, so there is no adapter to write; leave --adapter out."
        )
    else:
        _apply_to_files(source, delta, output)


def _apply_to_files(source: str, delta: SparseDelta, output: Path) -> None:
    """Writes the tuned checkpoint's tensors, and the base's other files."""
    from unmask.delta.rebuild import write_tuned

    write_tuned(delta, source, output)
    made = delta.metadata["between"]
    print(f"{len(delta):,} weights and {len(delta.whole):,} whole tensors applied to {source}; checkpoint in {output}")
    if any(made[kind] for kind in ("added", "removed", "replaced")):
        tuned = made["tuned"] or "the tuned checkpoint"
        print(f"note: config.json is the base's, and the tuned checkpoint has other tensors; take it from {tuned}.")


def _apply_to_model(source: str, delta: SparseDelta, output: Path, adapter: bool) -> None:
    """Writes the merged model, or the LoRA or adapter alone, and the tokenizer."""
    from unmask.lab.inside import into_of, merged, save_adapter
    from unmask.lab.models import load_tuned, quiet
    from unmask.quantised.layers import has_sidecars

    into = into_of(delta)
    if adapter and into is None:
        raise ConfigError("the delta changes the base itself, so there is no adapter to write; leave --adapter out.")
    model, tokenizer = load_tuned(source, delta)
    if has_sidecars(model):
        raise ConfigError(
            f"{source!r} is quantised, so the delta is kept next to its weights and cannot be written into its checkpoint. Keep "
            "base and delta apart, or merge in Python: unmask.quantised.dequantise_and_merge(model)."
        )
    with quiet():
        if adapter and into is not None:
            save_adapter(model, into, output)
        else:
            whole = model if into is None else merged(model, into)
            whole.save_pretrained(output)
        tokenizer.save_pretrained(output)
    what = f"ordinary {into.kind} adapter" if adapter and into is not None else "merged checkpoint"
    print(f"{len(delta):,} weights applied to {source}; {what} in {output}")
