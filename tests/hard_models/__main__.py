"""Compare hard models and print how each was taken: python -m hard_models --first 0 --count 100 [--keep FOLDER]."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kernel_harness import CACHE

from hard_models.comparing import judge, settled, summary


def main() -> int:
    """The exit code is 1 where a model came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=60, help="how many seeds")
    parser.add_argument("--keep", type=Path, help="a folder that the last model's files stay in")
    parser.add_argument("--step", type=int, default=1, help="every so many seeds: 8 from 7 on are the torch modules")
    parser.add_argument("--quiet", action="store_true", help="print only models that came out wrong, and the summary")
    given = parser.parse_args()
    verdicts = []
    for seed in range(given.first, given.first + given.count * given.step, given.step):
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
        verdict = judge(settled(seed), CACHE, given.keep)
        verdicts.append(verdict)
        if verdict.bad or not given.quiet:
            print(f"[{seed}] {verdict}", flush=True)
    print(summary(verdicts))
    return int(any(verdict.bad for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
