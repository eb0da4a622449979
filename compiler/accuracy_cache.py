"""Figures of accuracy, kept for the next compile of the same artifact.

A file `HASH.json` in `$LLMC_CACHE_DIR/accuracy` (or `~/.cache/llmc/accuracy`) is what the manifest says. The hash
covers the original and its weights, the artifact's code and weights, and the code that measures. What cannot be read
counts as not there; what cannot be written is not kept; what was not used for 30 days goes.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llmc.files import cache_folder

UNUSED_SECONDS = 30 * 24 * 3600.0


@dataclass(frozen=True)
class AccuracyCache:
    """The files of one folder."""

    folder: Path

    @classmethod
    def default(cls) -> AccuracyCache:
        return cls(cache_folder() / "accuracy")

    def read(self, key: str) -> dict[str, object] | None:
        """What was kept; None where nothing is, or what is there is no JSON object."""
        path = self.folder / f"{key}.json"
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(found, dict):
                with contextlib.suppress(OSError):
                    os.utime(path)
                return found
        return None

    def write(self, key: str, figures: Mapping[str, object]) -> None:
        """Keep figures, whole or not at all."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
            descriptor, temporary = tempfile.mkstemp(suffix=".partial", dir=self.folder)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    json.dump(figures, file)
                os.replace(temporary, self.folder / f"{key}.json")
            except BaseException:
                os.unlink(temporary)
                raise

    def _sweep(self) -> None:
        for path in (*self.folder.glob("*.json"), *self.folder.glob("*.partial")):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink()
