"""Compile a graph for a machine and run it once, for tests that compare compiled code with the numpy meaning."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from kernel_harness import CACHE, aligned

from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import bind_symbols
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.types import KV, Tensor
from llmc.compiler.pipeline import cache_indices, stored_values, weight_addresses
from llmc.compiler.progress import Silent
from llmc.compiler.weights import packed_arrays, place
from llmc.runtime.library import Step
from llmc.targets import lower
from llmc.targets.driver import SIZES, Addresses
from llmc.targets.library import build_library
from llmc.targets.lowering import Program
from llmc.targets.machine import Machine
from llmc.targets.memory import plan_memory

_SLOTS = {"LLMC_TOKENS": 0, "LLMC_TILES": 1, "LLMC_SEQUENCES": 2, "LLMC_PAGES": 3, "LLMC_ROWS": 4, "LLMC_SPLITS": 5}


class CompiledGraph:
    """A graph compiled for a machine, with its weights in memory. `run` gives the logits and the caches after."""

    def __init__(self, graph: Graph, machine: Machine, params: Mapping[str, np.ndarray], largest: int = 256) -> None:
        self.graph = graph
        self.program: Program = lower(graph, machine)
        sizes = dict.fromkeys(SIZES, largest) | {"SPLITS": 16}
        self.plan = plan_memory(self.program, sizes)
        placed, nbytes = place(stored_values(self.program))
        self.weights = aligned(np.zeros(nbytes + 64, np.uint8))
        for offset, _, array in packed_arrays(placed, lambda name: params[name]):
            self.weights[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        addresses = Addresses(self.plan, weight_addresses(placed), cache_indices(self.program.graph))
        with tempfile.TemporaryDirectory() as folder:
            self.library = build_library(self.program, addresses, CACHE, Path(folder), Silent(), 2)
            self.handle = ctypes.CDLL(str(self.library.path))
        self.handle.llmc_pool_create.restype = ctypes.c_void_p
        self.handle.llmc_pool_create()
        self.arena = aligned(np.full(self.plan.nbytes + 64, 0xFF, np.uint8))  # NaNs where nothing was written

    def run(
        self, inputs: Mapping[str, np.ndarray | Encoded | Pages], splits: int = 1, threads: int = 2
    ) -> tuple[np.ndarray, list[Pages]]:
        binding = bind_symbols(self.graph, inputs) | {"SPLITS": splits}
        output = dict(self.graph.outputs)["logits"].type
        assert isinstance(output, Tensor)
        from llmc.compiler.ir.dims import concrete

        logits = aligned(np.full([concrete(d, binding) for d in output.shape], np.nan, np.float32))
        step, kept, caches, tables = Step(), [], [], []
        for symbol, slot in SIZES.items():
            if symbol in binding:
                step.sizes[_SLOTS[slot]] = binding[symbol]
        for value in self.graph.inputs:
            data = inputs[value.name]
            if isinstance(value.type, KV):
                assert isinstance(data, Pages)
                pages = Pages(aligned(data.keys), aligned(data.values))
                caches.append(pages)
                tables += [pages.keys.ctypes.data, pages.values.ctypes.data]
                continue
            array = aligned(np.asarray(data))
            kept.append(array)
            setattr(step, value.name, array.ctypes.data)
        table = (ctypes.c_void_p * max(1, len(tables)))(*tables)
        step.cache = ctypes.addressof(table)
        step.logits, step.arena, step.weights = logits.ctypes.data, self.arena.ctypes.data, self.weights.ctypes.data
        assert self.handle.llmc_run(ctypes.byref(step), ctypes.c_int64(threads)) == 0
        return logits, caches
