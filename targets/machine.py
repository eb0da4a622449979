"""What a machine is: its instruction set, vector width and caches, as data."""

from __future__ import annotations

import hashlib
import importlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Machine:
    """A target machine. Equal machines produce equal code.

    name: what the user asked for (`native`, `x86-64-v4`, ...). arch: the folder under targets/ that serves it.
    mcpu: LLVM's name of a CPU, which says how long instructions take. features: the ISA features that code may use, and
    that an artifact therefore needs, in LLVM's spelling ("avx2", "avxvnni", "avx512f", "avx512vnni", "f16c", ...).
    Kernels ask for them, and the code generator has these and no others. vector_bits: the widest vector to use.
    Cache sizes are bytes per core (l3: shared). The thread count is not here: it is chosen when an artifact is loaded.
    """

    name: str
    arch: str
    mcpu: str
    features: frozenset[str]
    vector_bits: int
    l1_bytes: int = 32 << 10
    l2_bytes: int = 1 << 20
    l3_bytes: int = 16 << 20

    def has(self, *features: str) -> bool:
        """Whether the machine has every one of these features."""
        return self.features.issuperset(features)

    def attributes(self) -> list[str]:
        """LLVM's attributes, by which it uses the features and no others: the architecture's folder knows them."""
        module = importlib.import_module(f"llmc.targets.{self.arch}.features")
        attributes: list[str] = module.attributes(self.features)
        return attributes

    @property
    def triple(self) -> str:
        """LLVM's name of the architecture and the system, "x86_64-linux-gnu": its folder knows it."""
        found: str = importlib.import_module(f"llmc.targets.{self.arch}.features").TRIPLE
        return found

    @property
    def compiler_options(self) -> tuple[str, ...]:
        """What the C compiler is told for any machine of the architecture."""
        found: tuple[str, ...] = importlib.import_module(f"llmc.targets.{self.arch}.features").COMPILER_OPTIONS
        return found

    @property
    def architecture(self) -> str:
        """What the system calls the processors of this kind: "x86_64", "aarch64", ..."""
        name: str = importlib.import_module(f"llmc.targets.{self.arch}.target").architecture()
        return name

    @property
    def device(self) -> str:
        """The kind of device that runs its steps (`runtime/devices.py`)."""
        kind: str = importlib.import_module(f"llmc.targets.{self.arch}.target").device()
        return kind

    @property
    def key(self) -> str:
        """A short hash of everything that changes the code; part of the kernel cache's key."""
        facts = asdict(self) | {"features": sorted(self.features), "name": ""}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
