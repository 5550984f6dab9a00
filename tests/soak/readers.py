"""The fuzz test of all readers in its long form.

python tests/soak/readers.py --seed 1 --seconds 300 prints how many cases of each reader ended how, and stops at the first one
that is neither read nor refused. ``--only NAME --seed N --cases 1`` shows one case again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from reader_cases import READERS, run_case


def soak(seed: int, seconds: float, only: str | None = None, most: int | None = None) -> dict[str, Counter[str]]:
    """Runs cases of every reader in turn.

    Args:
        seed: Of the first case of each; the next has the next seed.
        seconds: How long.
        only: One reader alone.
        most: The most cases of each reader.

    Returns:
        By reader, how many cases ended as "same", "other" and "refused".
    """
    counts: dict[str, Counter[str]] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        cases = {}
        for name in [only] if only else READERS:
            (Path(folder) / name).mkdir()
            cases[name] = READERS[name](Path(folder) / name)
            counts[name] = Counter()
        number = 0
        while time.monotonic() < end and (most is None or number < most):
            for name, case in cases.items():
                counts[name][run_case(case, name, seed + number)] += 1
            number += 1
    return counts


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--only", choices=sorted(READERS))
    parser.add_argument("--cases", type=int)
    given = parser.parse_args()
    counts = soak(given.seed, given.seconds, given.only, given.cases)
    print(f"{'reader':<18}{'cases':>10}{'same':>10}{'other':>10}{'refused':>10}")
    for name, found in counts.items():
        print(f"{name:<18}{found.total():>10,}" + "".join(f"{found[key]:>10,}" for key in ("same", "other", "refused")))


if __name__ == "__main__":
    main()
