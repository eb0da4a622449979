"""One step of a loaded artifact again: its own kernels called one by one from Python, each beside its op's meaning.

The step's driver packs values into an arena, splits calls over threads, and knows every address when it is generated.
Here each value has memory of its own, addresses are looked up, and one thread does all units, the second half first.
So a kernel or a packed weight that is wrong shows beside the numpy meaning of its op, on the very operands that it was
given; and a plan of memory, a driver or a pool that is wrong shows as bits that differ from the step's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmc.compiler.ir.dims import Dim, concrete, product
from llmc.compiler.ir.elementwise import Cast
from llmc.compiler.ir.encoded import Pages
from llmc.compiler.ir.evaluate import Data, LoadParam, evaluate_values
from llmc.compiler.ir.graph import topological
from llmc.compiler.ir.interface import output_values
from llmc.compiler.ir.llm import KVAppend, QuantizeActivations
from llmc.compiler.ir.op import Input, Op, Param, Value
from llmc.compiler.ir.types import KV, NUMPY_DTYPES, Array, Tensor
from llmc.errors import CompileError
from llmc.runtime.memory import address, aligned_empty
from llmc.targets.kernel import CachePart, Call, Packed, Scratch, Workspace
from llmc.targets.lowering import LoweredOp, Program, values_of
from llmc.targets.memory import Plan, scratch_bytes, scratch_key, weight_key

KNOWN_BYTES = 1 << 30  # of decoded weights that are kept from one step to the next

# Told of each op that has run: the op as it was lowered, its operands as it found them, the array that it wrote.
Observer = Callable[[LoweredOp, "StepRun"], None]


@dataclass
class StepFacts:
    """What one step was given: inputs by name, caches in the order of the graph's, and the value of every size."""

    inputs: dict[str, Array]
    caches: list[Pages]
    binding: dict[str, int]


class Replay:
    """A program whose kernels and weights are those of a loaded artifact."""

    def __init__(
        self, program: Program, library: ctypes.CDLL, weights: Array, addresses: Mapping[object, int], load: LoadParam
    ) -> None:
        self.program, self.library, self.weights, self.addresses = program, library, weights, addresses
        self.load = load
        self._known: dict[Value, Data] = {}
        self._known_bytes = 0
        self._keep = _last_uses(program)

    def run(self, facts: StepFacts, observer: Observer | None = None, keep: bool = False) -> StepRun:
        """The step again; keep: all values stay readable afterwards."""
        run = StepRun(self, facts)
        for index, lowered in enumerate(self.program.ops):
            run.before = run.copied_caches(lowered)
            for call in lowered.calls:
                run.call(lowered, call)
            if observer is not None:
                observer(lowered, run)
            if not keep:
                for owner in self._keep.get(index, ()):
                    run.buffers.pop(owner, None)
        return run

    def known(self, value: Value) -> Data:
        """A value that was known when compiling, as it was stored: weights decoded, if there is room to keep them."""
        found = self._known.get(value)
        if found is None:
            found = evaluate_values([value], {}, self.load, {})["0"]
            nbytes = getattr(found, "nbytes", 0)
            if self._known_bytes + nbytes <= KNOWN_BYTES:
                self._known[value] = found
                self._known_bytes += nbytes
        return found


def _last_uses(program: Program) -> dict[int, list[Value]]:
    """Which buffers nobody reads behind each op of the program, through ops that have none of their own as well."""
    written = {lowered.op for lowered in program.ops if is_written(lowered)}
    last: dict[Value, int] = {}
    for index, lowered in enumerate(program.ops):
        stack: list[Value] = [*lowered.op.operands]
        stack += [value for call in lowered.calls for value in values_of(call)]
        seen: set[Value] = set()
        while stack:
            value = stack.pop()
            if value in seen or value in program.graph.constants:
                continue
            seen.add(value)
            last[program.buffer_of(value)] = index
            if value not in written and isinstance(value, Op):
                stack += value.operands
    for _, value in program.graph.outputs:
        last.pop(program.buffer_of(value), None)
    found: dict[int, list[Value]] = {}
    for value, index in last.items():
        if not isinstance(value, Input):
            found.setdefault(index, []).append(value)
    return found


def is_written(lowered: LoweredOp) -> bool:
    """Whether an op's result is an array in memory: not only scratches that its readers know."""
    return any("result" in call.args for call in lowered.calls)


@dataclass
class StepRun:
    """The memory of one step. Buffers are filled with 0xFF bytes until they are written."""

    replay: Replay
    facts: StepFacts
    buffers: dict[object, Array] = field(default_factory=dict)
    caches: list[Pages] = field(default_factory=list)
    before: dict[int, Pages] = field(default_factory=dict)  # caches that the op at hand appends to, before it did
    written: set[Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        program = self.replay.program
        for value in program.graph.inputs:
            if not isinstance(value.type, KV):
                self.buffers[value] = _aligned(self.facts.inputs[value.name])
        self.caches = [Pages(_aligned(pages.keys), _aligned(pages.values)) for pages in self.facts.caches]

    @property
    def binding(self) -> dict[str, int]:
        return self.facts.binding

    def cache_index(self, value: Value) -> int:
        """The number of the cache that a version descends from."""
        while isinstance(value, Op):
            value = value.operands[0]
        return [v for v in self.replay.program.graph.inputs if isinstance(v.type, KV)].index(value)  # type: ignore[arg-type]

    def copied_caches(self, lowered: LoweredOp) -> dict[int, Pages]:
        """A copy of the cache that an op is about to append to."""
        if not isinstance(lowered.op, KVAppend):
            return {}
        index = self.cache_index(lowered.op)
        pages = self.caches[index]
        return {index: Pages(pages.keys.copy(), pages.values.copy())}

    def array(self, value: Value) -> Array:
        """The elements of a value that has a buffer."""
        shape = tuple(concrete(dim, self.binding) for dim in value.shape)
        dtype = NUMPY_DTYPES[value.dtype]
        memory = self.memory(self.replay.program.buffer_of(value)).reshape(-1).view(np.uint8)
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        return memory[:nbytes].view(dtype).reshape(shape)

    def memory(self, owner: Value) -> Array:
        if owner not in self.buffers:
            assert isinstance(owner, Op) and isinstance(owner.type, Tensor)
            self.buffers[owner] = _filled(concrete(product(owner.shape), self.binding) * _itemsize(owner))
        return self.buffers[owner]

    def data(self, value: Value, rounded: bool = True) -> Data:
        """A value as the kernels have left it; where it has no buffer of its own, as its op makes it of its operands.

        rounded False: activations that have no buffer of their own are not rounded.
        """
        program = self.replay.program
        if value in program.graph.constants:
            return self.replay.known(value)
        if isinstance(value.type, KV):
            return self.caches[self.cache_index(value)]
        owner = program.buffer_of(value)
        if isinstance(owner, Input) or owner in self.written:
            return self.array(value)
        assert isinstance(value, Op)
        if not rounded and is_rounding(value):
            return self.data(unrounded(value), rounded)
        return self.meaning(value, rounded)

    def meaning(self, op: Op, rounded: bool = True) -> Data:
        """What an op makes of its operands as they are."""
        arguments: list[Data | None] = []
        for _, named in op.named_operands():
            if isinstance(named, tuple):
                arguments.extend(self.data(item, rounded) for item in named)
            else:
                arguments.append(None if named is None else self.data(named, rounded))
        with np.errstate(all="ignore"):
            found: Data = op.bind(self.binding).evaluate(*arguments)
        return found

    def call(self, lowered: LoweredOp, call: Call) -> None:
        """One call, the second half of its units first."""
        for guard in call.when:
            size = self.binding[guard.symbol]
            if size < guard.low or (guard.high is not None and size > guard.high):
                return
        arguments = [self._argument(argument, lowered, call) for argument in call.args]
        function = getattr(self.replay.library, call.kernel.symbol)
        function.restype = None
        assert isinstance(call.units, (int, Dim))
        units = concrete(call.units, self.binding)
        for begin, end in ((units // 2, units), (0, units // 2)):
            if begin < end:
                function(*arguments, ctypes.c_int64(begin), ctypes.c_int64(end))
        if "result" in call.args:
            self.written.add(self.replay.program.buffer_of(lowered.op))

    def _argument(self, argument: object, lowered: LoweredOp, call: Call) -> object:
        if isinstance(argument, (int, Dim)):
            return ctypes.c_int64(concrete(argument, self.binding))
        program = self.replay.program
        if isinstance(argument, Workspace):
            argument = Scratch("workspace", "u8", argument.nbytes)
        if isinstance(argument, Scratch):
            key = scratch_key(lowered.op, argument)
            if key not in self.buffers:
                self.buffers[key] = _filled(scratch_bytes(argument, self.binding))
            return ctypes.c_void_p(address(self.buffers[key]))
        if isinstance(argument, Packed):
            return self._weight(weight_key(argument))
        if isinstance(argument, CachePart):
            assert isinstance(argument.value, Value)
            pages = self.caches[self.cache_index(argument.value)]
            return ctypes.c_void_p(address(pages.values if argument.part == "values" else pages.keys))
        value = lowered.op if argument == "result" else argument
        if not isinstance(value, Value):
            raise CompileError(f"kernel {call.kernel.describe()}: {argument!r} is no argument")
        if value in program.graph.constants:
            return self._weight(value)
        return ctypes.c_void_p(address(self.memory(program.buffer_of(value))))

    def _weight(self, key: object) -> ctypes.c_void_p:
        return ctypes.c_void_p(address(self.replay.weights) + self.replay.addresses[key])

    def outputs(self) -> dict[str, Array]:
        """The outputs that a step writes, by name."""
        found = {}
        for name, value in output_values(self.replay.program.graph):
            data = self.data(value)
            assert isinstance(data, np.ndarray)
            found[name] = data
        return found

    def first_difference(self, plan: Plan, arena: Array) -> str:
        """The first op whose result in a step's arena has other bits, of those that nothing has overwritten since."""
        program = self.replay.program
        order = [lowered for lowered in program.ops if is_written(lowered)]
        for index, lowered in enumerate(order):
            owner = program.buffer_of(lowered.op)
            if owner not in plan.offsets:
                continue
            mine = self.array(lowered.op).reshape(-1).view(np.uint8)
            begin = plan.offsets[owner]
            later = [program.buffer_of(other.op) for other in order[index + 1 :]]
            spans = [(plan.offsets[o], plan.offsets[o] + self.memory(o).nbytes) for o in later if o in plan.offsets]
            if any(begin < end and start < begin + mine.nbytes for start, end in spans):
                continue
            if not np.array_equal(arena[begin : begin + mine.nbytes], mine):
                return describe(lowered)
        return ""


def is_rounding(value: Value) -> bool:
    """Whether an op rounds activations for the product behind it, and does nothing else."""
    if isinstance(value, QuantizeActivations):
        return True
    return isinstance(value, Cast) and isinstance(value.x, Cast) and value.dtype == value.x.x.dtype == "f32"


def unrounded(value: Value) -> Value:
    """What an op that `is_rounding` rounds."""
    if isinstance(value, QuantizeActivations):
        return value.x
    assert isinstance(value, Cast) and isinstance(value.x, Cast)
    return value.x.x


def describe(lowered: LoweredOp) -> str:
    """An op and its kernels, for people."""
    kernels = ", ".join(dict.fromkeys(call.kernel.name for call in lowered.calls))
    # Weights right under the op, not those of all the layers in front of it.
    names = [
        item.name
        for operand in lowered.op.operands
        for item in (topological([operand]) if not _needs_inputs(operand) else ())
        if isinstance(item, Param)
    ]
    weight = f" of {names[0]}" if names else ""
    return f"{lowered.op.name}{weight} (kernel {kernels})"


def _needs_inputs(value: Value) -> bool:
    return any(isinstance(item, Input) for item in topological([value]))


def _itemsize(value: Value) -> int:
    return NUMPY_DTYPES[value.dtype].itemsize


def _aligned(array: Array) -> Array:
    copy = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _filled(nbytes: int) -> Array:
    memory = aligned_empty(max(1, nbytes))
    memory[...] = 0xFF
    return memory
