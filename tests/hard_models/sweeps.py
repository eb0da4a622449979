"""What the tests of many hard models share: `make test-all` has them in files, which processes share out among them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from kernel_harness import CACHE

from hard_models.comparing import judge, settled, summary
from hard_models.seeds import MANY

PATIENCE = 7200  # seconds: a shard is a minute of work, on a machine that may be busy with other things
FILES = 4


def shards(seeds: Sequence[int], size: int) -> list[object]:
    """Seeds in groups, named by their ends."""
    parts = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    return [pytest.param(part, id=f"{part[0]}-{part[-1]}") for part in parts]


def part_of_many(number: int) -> list[object]:
    """The shards of one of the files, 1 to FILES."""
    size = MANY // FILES
    return shards(range((number - 1) * size, number * size), 50)


def none_wrong(seeds: Sequence[int]) -> None:
    """Compare models; what is printed is how each was taken."""
    verdicts = [judge(settled(seed), CACHE) for seed in seeds]
    print(*verdicts, summary(verdicts), sep="\n")
    wrong = [f"[{verdict.spec.seed}] {verdict}" for verdict in verdicts if verdict.bad]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(verdicts)} models came out wrong", *wrong])
