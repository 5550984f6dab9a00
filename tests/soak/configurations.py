"""The test of random configurations in its long form.

python tests/soak/configurations.py --seed 1 --seconds 300 prints how many were refused and how many kept every promise, and stops
at the first one that did neither. ``--seed N --cases 1`` shows one again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from random_configurations import run_case


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int)
    given = parser.parse_args()
    outcomes: Counter[str] = Counter()
    end = time.monotonic() + given.seconds
    while time.monotonic() < end and (given.cases is None or outcomes.total() < given.cases):
        seed = given.seed + outcomes.total()
        try:
            outcomes[run_case(seed)] += 1
        except BaseException:
            print(f"configuration of seed {seed}:", flush=True)
            raise
    print(
        f"{outcomes.total():,} configurations: {outcomes['kept']:,} kept every promise, {outcomes['refused']:,} were refused"
    )


if __name__ == "__main__":
    main()
