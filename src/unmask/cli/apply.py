"""``unmask apply``: base + delta as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path

from unmask.delta import SparseDelta
from unmask.errors import ConfigError
from unmask.modeling import load_tuned, quiet
from unmask.quantised.layers import has_sidecars


def run_apply(source: str, delta_path: Path, output: Path) -> None:
    """Writes the merged model and its tokenizer to a new folder."""
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"{str(output)!r} is not empty; give a new folder.")
    delta = SparseDelta.load(delta_path)
    model, tokenizer = load_tuned(source, delta)
    if has_sidecars(model):
        raise ConfigError(
            f"{source!r} is quantised, so the delta stands beside its weights and cannot be written into its checkpoint. Keep "
            "base and delta apart, or merge in Python: unmask.quantised.dequantise_and_merge(model)."
        )
    with quiet():
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    print(f"{len(delta):,} weights applied to {source}; merged checkpoint in {output}")
