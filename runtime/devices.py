"""The kinds of devices there are, by the name that a manifest has for them."""

from __future__ import annotations

import importlib

from llmc.runtime.artifact import Artifact
from llmc.runtime.device import Device
from llmc.runtime.errors import ArtifactError

# Module and class; what it is made with is the number of threads, and the CPUs that they keep to (None: any).
KINDS = {"host": ("llmc.runtime.host", "Host")}


def device_for(artifact: Artifact, threads: int, cpus: frozenset[int] | None = None) -> Device:
    """A device of the kind that the artifact is for. Raises `ArtifactError` for a kind that this runtime lacks."""
    kind = artifact.manifest.target.device
    if kind not in KINDS:
        raise ArtifactError(
            f"{artifact.path} runs on a device of the kind {kind!r:.40}, and this llmc knows {', '.join(KINDS)}: "
            f"install a newer llmc, or run: {artifact.rebuild_command()}"
        )
    module, name = KINDS[kind]
    made: Device = getattr(importlib.import_module(module), name)(threads, cpus)
    return made
