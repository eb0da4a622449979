"""Many small graphs compiled together, and run call by call from Python: compiled code without a library a graph.

Kernels are those of the real thing, for the same arguments. What is not covered is the driver: its plan of memory, its
generated C and the thread pool, for which `program_harness` compiles a graph as a library.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from kernel_harness import aligned, skip_unless_runnable

from llmc.compiler.ir.dims import concrete
from llmc.compiler.ir.evaluate import bind_symbols
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input, Value
from llmc.compiler.ir.types import NUMPY_DTYPES, Tensor
from llmc.compiler.pipeline import stored_values, weight_addresses
from llmc.compiler.weights import Stored, packed_arrays, place
from llmc.targets import lower
from llmc.targets.cpu.codegen import object_code
from llmc.targets.cpu.library import kernels_of
from llmc.targets.kernel import Call, Kernel, Packed, Scratch, Workspace
from llmc.targets.lowering import LoweredOp, Program
from llmc.targets.machine import Machine
from llmc.targets.memory import scratch_bytes, scratch_key, weight_key

_TOGETHER = 48  # kernels in one module


class ProgramBatch:
    """Programs of one machine: `add` all of them, `build` once, then `run` each."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.kernels: dict[str, Kernel] = {}
        self.handle: ctypes.CDLL | None = None

    def add(self, graph: Graph) -> Program:
        """Lower a graph."""
        program = lower(graph, self.machine)
        self.kernels.update({kernel.symbol: kernel for kernel in kernels_of(program)})
        return program

    def build(self) -> None:
        """Compile every kernel once."""
        wanted = list(self.kernels.values())
        chunks = [wanted[start : start + _TOGETHER] for start in range(0, len(wanted), _TOGETHER)]
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = []
            for number, code in enumerate(pool.map(lambda chunk: object_code(chunk, self.machine), chunks)):
                objects.append(Path(folder) / f"{number}.o")
                objects[-1].write_bytes(code)
            library = Path(folder) / "kernels.so"
            subprocess.run(["gcc", "-shared", "-o", str(library), *map(str, objects), "-lm"], check=True)
            self.handle = ctypes.CDLL(str(library))

    def run(
        self, program: Program, inputs: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The outputs of a program by name. Every split of a call's units gives the same: they run in two parts."""
        skip_unless_runnable(self.machine)
        binding = bind_symbols(program.graph, inputs)  # type: ignore[arg-type]
        run = _Run(self, program, binding, inputs, params or {})
        for lowered in program.ops:
            for call in lowered.calls:
                run.call(lowered, call)
        return {name: run.array(value) for name, value in program.graph.outputs}


class _Run:
    """The memory of one run: a buffer for each value, filled with 0xFF bytes until it is written."""

    def __init__(
        self,
        batch: ProgramBatch,
        program: Program,
        binding: Mapping[str, int],
        inputs: Mapping[str, np.ndarray],
        params: Mapping[str, np.ndarray],
    ) -> None:
        self.handle, self.program, self.binding = batch.handle, program, binding
        self.buffers: dict[object, np.ndarray] = {}
        for value in program.graph.inputs:
            self.buffers[value] = aligned(np.asarray(inputs[value.name]))
        outputs = [program.buffer_of(value) for _, value in program.graph.outputs]
        constants = dict.fromkeys(value for value in outputs if value in program.graph.constants)
        stored = [*stored_values(program), *(Stored(value, None) for value in constants)]
        placed, nbytes = place(stored)
        weights = aligned(np.zeros(nbytes + 64, np.uint8))
        for offset, _, array in packed_arrays(placed, params.__getitem__):
            weights[offset : offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        for key, offset in weight_addresses(placed).items():
            self.buffers[key] = weights[offset:]

    def array(self, value: Value) -> np.ndarray:
        """A value's elements."""
        shape = [concrete(dim, self.binding) for dim in value.shape]
        dtype = NUMPY_DTYPES[value.dtype]
        memory = self.memory(self.program.buffer_of(value)).reshape(-1).view(np.uint8)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return memory[:nbytes].view(dtype).reshape(shape)

    def memory(self, owner: Value) -> np.ndarray:
        if owner not in self.buffers:
            assert not isinstance(owner, Input) and isinstance(owner.type, Tensor)
            count = int(np.prod([concrete(dim, self.binding) for dim in owner.shape], dtype=np.int64))
            self.buffers[owner] = aligned(np.full(count * NUMPY_DTYPES[owner.dtype].itemsize, 0xFF, np.uint8))
        return self.buffers[owner]

    def call(self, lowered: LoweredOp, call: Call) -> None:
        """One call, the second half of its units first."""
        for guard in call.when:
            size = self.binding[guard.symbol]
            if size < guard.low or (guard.high is not None and size > guard.high):
                return
        arguments = [self._argument(argument, lowered) for argument in call.args]
        function = getattr(self.handle, call.kernel.symbol)
        function.restype = None
        units = concrete(call.units, self.binding)  # type: ignore[arg-type]
        for begin, end in ((units // 2, units), (0, units // 2)):
            if begin < end:
                function(*arguments, ctypes.c_int64(begin), ctypes.c_int64(end))

    def _argument(self, argument: object, lowered: LoweredOp) -> object:
        if isinstance(argument, Workspace):
            argument = Scratch("workspace", "u8", argument.nbytes)
        if isinstance(argument, Scratch):
            key = scratch_key(lowered.op, argument)
            if key not in self.buffers:
                self.buffers[key] = aligned(np.full(scratch_bytes(argument, self.binding), 0xFF, np.uint8))
            return ctypes.c_void_p(self.buffers[key].ctypes.data)
        if isinstance(argument, Packed):
            return ctypes.c_void_p(self.buffers[weight_key(argument)].ctypes.data)
        value = lowered.op if argument == "result" else argument
        if isinstance(value, Value):
            return ctypes.c_void_p(self.memory(self.program.buffer_of(value)).ctypes.data)
        return ctypes.c_int64(concrete(value, self.binding))  # type: ignore[arg-type]
