"""A cache folder of a test's own, in which compiled kernels are everybody's: those take many seconds to make."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmc.files import cache_folder


def use_own_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What llmc caches from here on goes into `folder`, which is made; kernels go where they went before."""
    kernels = cache_folder() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels").symlink_to(kernels, target_is_directory=True)
    monkeypatch.setenv("LLMC_CACHE_DIR", str(folder))
