"""Compile a graph for a machine and run it once, for tests that compare compiled code with the numpy meaning."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from kernel_harness import CACHE, aligned, skip_unless_runnable

from llmc.compiler.ir.encoded import Encoded, Pages
from llmc.compiler.ir.evaluate import bind_symbols
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.interface import output_values, size_names
from llmc.compiler.ir.types import KV, NUMPY_DTYPES, Tensor, itemsize
from llmc.compiler.pipeline import cache_indices, stored_values, weight_addresses
from llmc.compiler.progress import Silent
from llmc.compiler.weights import packed_arrays, place
from llmc.runtime.library import Step
from llmc.targets import lower
from llmc.targets.cpu.library import build_library
from llmc.targets.lowering import Program
from llmc.targets.machine import Machine
from llmc.targets.memory import plan_memory
from llmc.targets.step_limits import SIZES, STEP_FAILURES, StepLimits, adapter_tables
from llmc.targets.target import Addresses

_SLOTS = {"LLMC_TOKENS": 0, "LLMC_TILES": 1, "LLMC_SEQUENCES": 2, "LLMC_PAGES": 3, "LLMC_ROWS": 4, "LLMC_SPLITS": 5}
_SLOTS |= {"LLMC_PROMPT": 6, "LLMC_ADAPTED": 7}


class CompiledGraph:
    """A graph compiled for a machine, with its weights in memory.

    task "generate": `run` gives the logits and the caches after. "encode" and "run": `run_arrays` gives all outputs.
    largest: the greatest value of sizes that have none of their own. limits: of a step's ids and positions. spoil: what
    changes a step that is about to be called.
    """

    def __init__(
        self,
        graph: Graph,
        machine: Machine,
        params: Mapping[str, np.ndarray],
        largest: int = 256,
        task: str = "generate",
        **limits: int,
    ) -> None:
        skip_unless_runnable(machine)  # before minutes of compiling
        self.graph, self.machine = graph, machine
        self.spoil: Callable[[Step], None] = lambda _step: None
        self.task = task
        self.program: Program = lower(graph, machine)
        sizes = dict.fromkeys(SIZES, largest) | {"SPLITS": 16}
        if task == "run":
            sizes = {symbol.name: symbol.high or largest for symbol in self.program.graph.symbols}
        self.plan = plan_memory(self.program, sizes)
        placed, nbytes = place(stored_values(self.program))
        self.weights = aligned(np.zeros(nbytes + 64, np.uint8))
        for offset, _, array in packed_arrays(placed, lambda name: params[name]):
            self.weights[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        addresses = Addresses(
            self.plan, weight_addresses(placed), cache_indices(self.program.graph), task, StepLimits(sizes, **limits)
        )
        with tempfile.TemporaryDirectory() as folder:
            self.library = build_library(self.program, addresses, CACHE, Path(folder), Silent(), 2)
            self.handle = ctypes.CDLL(str(self.library.path))
        self.handle.llmc_pool_create.restype = ctypes.c_void_p
        self.handle.llmc_pool_create()
        self.code, self.allowed = 0, False  # what the last step returned; whether it may be a failure
        self.arena = aligned(np.full(self.plan.nbytes + 64, 0xFF, np.uint8))  # NaNs where nothing was written

    def run(
        self, inputs: Mapping[str, np.ndarray | Encoded | Pages], splits: int = 1, threads: int = 2
    ) -> tuple[np.ndarray, list[Pages]]:
        binding = bind_symbols(self.graph, inputs) | {"SPLITS": splits}
        output = dict(self.graph.outputs)["logits"].type
        assert isinstance(output, Tensor)
        from llmc.compiler.ir.dims import concrete

        logits = aligned(np.full([concrete(d, binding) for d in output.shape], np.nan, np.float32))
        step = Step()
        step.logits = logits.ctypes.data
        return logits, self._call(step, inputs, binding, threads)

    def run_arrays(
        self, inputs: Mapping[str, np.ndarray | Encoded | Pages], splits: int = 1, threads: int = 2
    ) -> dict[str, np.ndarray]:
        """Every output by name, caches left out; for tasks "encode" and "run". Untouched elements are 0xFF bytes."""
        from llmc.compiler.ir.dims import concrete

        binding = bind_symbols(self.graph, inputs)
        results = {}
        for name, value in output_values(self.program.graph):
            shape = [concrete(d, binding) for d in value.shape]
            results[name] = aligned(np.full([*shape, itemsize(value.dtype)], 0xFF, np.uint8))
            results[name] = results[name].reshape(-1).view(NUMPY_DTYPES[value.dtype]).reshape(shape)
        # The same output may have two names, but each has memory of its own; a pointer to nothing is never read.
        outputs = (ctypes.c_void_p * max(1, len(results)))(*(array.ctypes.data for array in results.values()))
        step = Step()
        step.outputs = ctypes.addressof(outputs)
        self._call(step, inputs, binding | {"SPLITS": splits}, threads)
        return results

    def run_or_code(
        self, inputs: Mapping[str, np.ndarray | Encoded | Pages], output: str, threads: int = 2
    ) -> np.ndarray | int:
        """One output, or which of the graph's own failures the step has found: 1, 2, ..."""
        self.code = 0
        self.allowed = True
        try:
            found = self.run_arrays(inputs, threads=threads)[output]
        finally:
            self.allowed = False
        assert self.code == 0 or self.code > len(STEP_FAILURES)
        return self.code - len(STEP_FAILURES) if self.code else found

    def _call(
        self,
        step: Step,
        inputs: Mapping[str, np.ndarray | Encoded | Pages],
        binding: Mapping[str, int],
        threads: int,
    ) -> list[Pages]:
        """Fills in what every task needs, and runs the step; returns the caches after."""
        skip_unless_runnable(self.machine)
        kept, caches, tables, adapter_places = [], [], [], []
        adapted = adapter_tables(self.graph)
        step.sizes[_SLOTS["LLMC_PROMPT"]] = int(binding.get("T", 0) > 16)
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
                step.cache_pages = len(pages.keys)
                continue
            array = aligned(np.asarray(data))
            kept.append(array)
            if value.name == "adapters":
                step.sizes[_SLOTS["LLMC_ADAPTED"]] = int(np.count_nonzero(array))
            if value in adapted:
                adapter_places.append(array.ctypes.data)
            elif self.task != "run":
                setattr(step, value.name, array.ctypes.data)
        given = (ctypes.c_void_p * max(1, len(kept)))(*(array.ctypes.data for array in kept))
        names = size_names(self.program.graph) if self.task == "run" else []
        dims = (ctypes.c_int64 * max(1, len(names)))(*(binding[name] for name in names))
        step.inputs, step.dims = ctypes.addressof(given), ctypes.addressof(dims)
        table = (ctypes.c_void_p * max(1, len(tables)))(*tables)
        step.cache = ctypes.addressof(table)
        places = (ctypes.c_void_p * max(1, len(adapter_places)))(*adapter_places)
        step.adapter_tables = ctypes.addressof(places)
        step.arena, step.weights = self.arena.ctypes.data, self.weights.ctypes.data
        step.arena_bytes = self.plan.nbytes
        self.spoil(step)
        self.code = self.handle.llmc_run(ctypes.byref(step), ctypes.c_int64(threads))
        assert self.code == 0 or self.allowed
        return caches
