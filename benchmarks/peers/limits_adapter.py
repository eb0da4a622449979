"""What this machine can do at most, measured by kernels of llmc's own: memory reads, and multiply-adds in registers."""

from __future__ import annotations

import json
import sys

from protocol import say


def main() -> None:
    """Prints one JSON line: {"read": bytes a second, "int8": operations a second, ...} with the asked threads."""
    from llmc.targets import machine_named
    from llmc.targets.cpu.limits import measure

    threads = int(json.loads(sys.argv[2])["threads"])
    limits = measure(machine_named("native"), threads)
    say({"read": limits.read_bytes_per_second, **limits.peaks()})


if __name__ == "__main__":
    main()
