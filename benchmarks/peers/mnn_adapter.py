"""MNN's own language-model runtime."""

from __future__ import annotations

from pathlib import Path

from protocol import Engine, Facts, Options, PeerError, Task, main

_REASON = "the MNN wheel's converter is not driven from here"


class MnnAdapter:
    def check(self) -> Facts:
        raise PeerError(_REASON)

    def convert(self, model: Path, out: Path, options: Options) -> Facts:
        raise PeerError(_REASON)

    def load(self, task: Task) -> Engine:
        raise PeerError(_REASON)


if __name__ == "__main__":
    main(MnnAdapter())
