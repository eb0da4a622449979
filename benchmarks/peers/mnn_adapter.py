"""MNN: says why it is not measured.

Its wheel runs language models, but what exports them lies only in MNN's source tree; and importing the wheel's
converter sends usage to a log service and installs packages.
"""

from __future__ import annotations

from pathlib import Path

from protocol import Engine, Facts, Options, PeerError, Task, main

_REASON = "the MNN wheel has no exporter for language models"


class MnnAdapter:
    def check(self) -> Facts:
        raise PeerError(_REASON)

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        raise PeerError(_REASON)

    def load(self, task: Task) -> Engine:
        raise PeerError(_REASON)


if __name__ == "__main__":
    main(MnnAdapter())
