"""Hard models, part 4 of 4: see `test_hard_models.py`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hard_models.sweeps import PATIENCE, none_wrong, part_of_many


@pytest.mark.slow
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("seeds", part_of_many(4))
def test_no_model_is_silently_wrong(seeds: Sequence[int]) -> None:
    none_wrong(seeds)
