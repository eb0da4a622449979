"""The step driver: generated C that calls a program's kernels in order, each split over the thread pool.

C rather than TIR: a straight list of calls compiles in a fraction of a second with -O1, needs no packed calling
convention, reads well in a debugger, and shares nothing with TVM's runtime (docs/adr/0002).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmc.compiler.ir.dims import Dim, FloorDiv, product
from llmc.compiler.ir.interface import output_values, size_names
from llmc.compiler.ir.op import Input, Op, Value
from llmc.compiler.ir.types import itemsize
from llmc.errors import CompileError
from llmc.targets.facts import facts_source
from llmc.targets.joining import JoinedLoop, joined_loop
from llmc.targets.kernel import FAILED, CachePart, Call, Packed, Range, Scratch, Workspace
from llmc.targets.lowering import LoweredOp, Program
from llmc.targets.memory import needs_arena, scratch_key, weight_key
from llmc.targets.step_limits import INPUTS, SIZES, adapter_tables, failures_of, limits_source
from llmc.targets.target import Addresses


def c_expression(size: int | Dim, names: Mapping[str, str] | None = None) -> str:
    """A size as a C expression over the symbols, all int64. names: what a symbol is called in C, if not as it is."""
    known = names or {}
    if isinstance(size, int):
        return f"INT64_C({size})"
    parts = []
    for monomial, coefficient in size.terms:
        factors = [] if coefficient == 1 and monomial else [f"INT64_C({coefficient})"]
        for atom, power in monomial:
            text = (
                f"floor_division({c_expression(atom.numerator, known)}, INT64_C({atom.divisor}))"
                if isinstance(atom, FloorDiv)
                else known.get(atom.name, atom.name)
            )
            factors += [text] * power
        parts.append(" * ".join(factors))
    return "(" + " + ".join(parts) + ")"


@dataclass(frozen=True)
class _Interface:
    """What the step's struct is called in C for this program.

    symbols: (C name, expression) of every size; names: what a symbol is called in C. owned: where the values lie that
    are computed right into an output; copies: (output, source) of outputs that share their buffer with something else.
    """

    symbols: tuple[tuple[str, str], ...]
    names: Mapping[str, str]
    owned: Mapping[Value, str]
    copies: tuple[tuple[int, Value], ...]


def _interface(program: Program, task: str) -> _Interface:
    symbols = tuple((name, f"step->sizes[{slot}]") for name, slot in SIZES.items())
    if task == "generate":
        logits = [program.buffer_of(value) for name, value in program.graph.outputs if name == "logits"]
        return _Interface(symbols, {}, dict.fromkeys(logits, "step->logits"), ())
    names: dict[str, str] = {}
    if task == "run":  # names of a model's own may be anything, so the C code has numbers
        names = {name: f"size_{index}" for index, name in enumerate(size_names(program.graph))}
        symbols = tuple((short, f"step->dims[{index}]") for index, short in enumerate(names.values()))
    owned: dict[Value, str] = {}
    copies: list[tuple[int, Value]] = []
    for index, (_, value) in enumerate(output_values(program.graph)):
        owner = program.buffer_of(value)
        if isinstance(owner, Input) or value in program.graph.constants or owner in owned:
            copies.append((index, value))
        else:
            owned[owner] = f"step->outputs[{index}]"
    return _Interface(symbols, names, owned, tuple(copies))


def generate_step(program: Program, addresses: Addresses) -> tuple[str, list[str]]:
    """The C source of `llmc_step`, and for each profile slot what it measures."""
    interface = _interface(program, addresses.task)
    bodies, steps, labels = _calls(program, addresses, interface)
    declarations = _declarations(program)
    for index, value in interface.copies:
        nbytes = c_expression(product(value.shape) * itemsize(value.dtype), interface.names)
        source = _address(value, program, addresses, interface)
        steps.append(f"    memcpy(step->outputs[{index}], {source}, (size_t){nbytes});")
    symbols = " \\\n".join(
        f"    const int64_t {name} = {expression}; (void){name};" for name, expression in interface.symbols
    )
    workspace = max(
        (a.nbytes for o in program.ops for c in o.calls for a in c.args if isinstance(a, Workspace)), default=0
    )
    if workspace:  # allocated when a thread first needs it
        declarations.append(f"static _Thread_local _Alignas(64) unsigned char workspace[{workspace}];")
    limits = limits_source(
        program.graph, addresses.task, addresses.limits, addresses.plan.nbytes, bool(addresses.weights)
    )
    text = _TEMPLATE.format(
        declarations="\n".join(declarations), symbols=symbols, bodies="\n".join(bodies), steps="\n".join(steps),
        limits=limits, facts=facts_source(addresses.manifest),
    )  # fmt: skip
    return text, labels


def _calls(program: Program, addresses: Addresses, interface: _Interface) -> tuple[list[str], list[str], list[str]]:
    """Of each call: a function of a range of its units, the statements that run it, and what a profile calls it."""
    bodies: list[str] = []
    steps: list[str] = []
    labels: list[str] = []
    codes = {failure: code for code, failure in enumerate(failures_of(program), 1)}
    starts: list[tuple[int, int]] = []  # of each op, among the calls and the steps
    for place, lowered in enumerate(program.ops):
        starts.append((len(labels), len(steps)))
        for call in lowered.calls:
            index = len(labels)
            arguments = [_argument(argument, lowered, call, program, addresses, interface) for argument in call.args]
            bodies.append(
                f"/* {lowered.op.name}: {call.kernel.name} {call.note} */\n"
                f"static void body_{index}(void *context, int64_t begin, int64_t end)\n{{\n"
                f"    ENTER(context);\n"
                f"    {call.kernel.symbol}({', '.join([*arguments, 'begin', 'end'])});\n}}\n"
            )
            assert isinstance(call.units, (int, Dim))
            loop = f"{c_expression(call.units, interface.names)}, {max(1, call.grain)}"
            run = f"    RUN({index}, {_condition(call.when, interface)}, {loop});"
            if call.failure:
                failed = f"*(int32_t *)ARENA({addresses.plan.offsets[scratch_key(lowered.op, FAILED)]})"
                run = f"    {failed} = 0;\n{run}\n    if ({failed})\n        return {codes[call.failure]};"
            steps.append(run)
            labels.append(f"{lowered.op.name} {call.kernel.name} {call.note}".strip())
        joined = joined_loop(program, place)
        if joined is not None:
            (_, first), (index, after) = starts[joined.parts[0].place], starts[-1]
            bodies.append(_joined_body(joined, index, [begin for begin, _ in starts]))
            apart = steps[first : after + 1]
            steps[first : after + 1] = [_joined_run(joined, index, lowered.calls[0], apart, interface)]
    return bodies, steps, labels


def _declarations(program: Program) -> list[str]:
    """Of the kernels, in the order of their first calls. CompileError where calls of one differ."""
    found: dict[str, Call] = {}
    for call in (call for lowered in program.ops for call in lowered.calls):
        first = found.setdefault(call.kernel.symbol, call)
        if len(first.args) != len(call.args):
            raise CompileError(f"kernel {call.kernel.describe()} is called with different argument counts")
    kinds = {
        symbol: ["int64_t" if isinstance(argument, (int, Dim)) else "void *" for argument in call.args]
        for symbol, call in found.items()
    }
    return [f"void {symbol}({', '.join([*each, 'int64_t', 'int64_t'])});" for symbol, each in kinds.items()]


def _condition(when: tuple[Range, ...], interface: _Interface) -> str:
    """C for "all of these hold"."""
    guards = []
    for item in when:
        name = interface.names.get(item.symbol, item.symbol)
        if item.low > 0:
            guards.append(f"{name} >= {item.low}")
        if item.high is not None:
            guards.append(f"{name} <= {item.high}")
    return " && ".join(guards) or "1"


def _joined_body(joined: JoinedLoop, index: int, starts: Sequence[int]) -> str:
    """The body of a loop that runs the units of other calls before those of call `index`."""
    lines = [
        f"    body_{starts[part.place] + part.number}(context, {first} + begin * {count}, {first} + end * {count});\n"
        for part in joined.parts
        for first, count in part.ranges
    ]
    return (
        f"static void joined_{index}(void *context, int64_t begin, int64_t end)\n{{\n"
        f"{''.join(lines)}    body_{index}(context, begin, end);\n}}\n"
    )


def _joined_run(joined: JoinedLoop, index: int, call: Call, apart: Sequence[str], interface: _Interface) -> str:
    """One loop, or else the loops `apart`: also while kernels are timed, each by itself."""
    assert isinstance(call.units, (int, Dim))
    loop = f"joined_{index}, (void *)(uintptr_t)step, {c_expression(call.units, interface.names)}, {max(1, call.grain)}"
    condition = f"!step->profile && {_condition(joined.when, interface)}"
    return f"    if ({condition}) {{\n    llmc_parallel({loop});\n    }} else {{\n" + "\n".join(apart) + "\n    }"


def _argument(
    argument: object, lowered: LoweredOp, call: Call, program: Program, addresses: Addresses, interface: _Interface
) -> str:
    if isinstance(argument, (int, Dim)):
        return c_expression(argument, interface.names)
    if isinstance(argument, Scratch):
        return f"ARENA({addresses.plan.offsets[scratch_key(lowered.op, argument)]})"
    if isinstance(argument, Workspace):
        return "workspace"
    if isinstance(argument, Packed):
        return f"WEIGHT({addresses.weights[weight_key(argument)]})"
    if isinstance(argument, CachePart):
        assert isinstance(argument.value, Value)
        cache = addresses.caches[_cache_input(argument.value)]
        return f"step->cache[{2 * cache + (argument.part == 'values')}]"
    value = lowered.op if argument == "result" else argument
    if not isinstance(value, Value):
        raise CompileError(f"kernel {call.kernel.describe()}: {argument!r} is no argument")
    return _address(value, program, addresses, interface)


def _cache_input(value: Value) -> Value:
    """The graph input that a cache version descends from: versions share one buffer."""
    while isinstance(value, Op):
        value = value.operands[0]
    return value


def _address(value: Value, program: Program, addresses: Addresses, interface: _Interface) -> str:
    if value in program.graph.constants:
        return f"WEIGHT({addresses.weights[value]})"
    owner = program.buffer_of(value)
    if isinstance(owner, Input):
        if addresses.task == "run":
            return f"(void *)(uintptr_t)step->inputs[{program.graph.inputs.index(owner)}]"
        tables = adapter_tables(program.graph)
        if owner in tables:
            return f"step->adapter_tables[{tables.index(owner)}]"
        if owner.name not in INPUTS:
            raise CompileError(f"the graph has an input {owner.name!r} that the step does not give")
        return f"(void *)(uintptr_t)step->{owner.name}"
    if owner in interface.owned:
        return interface.owned[owner]
    assert needs_arena(owner, program)
    return f"ARENA({addresses.plan.offsets[owner]})"


_TEMPLATE = """/* Generated by llmc: one step of the model. Kernels are plain C functions over a range of work units. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "facts.h"
#include "pool.h"
#include "step.h"
#include "step_check.h"

{declarations}

{limits}

{facts}

static inline int64_t floor_division(int64_t value, int64_t divisor)
{{
    return value / divisor - (value % divisor < 0);
}}

#define ARENA(offset) ((void *)((char *)step->arena + INT64_C(offset)))
#define WEIGHT(offset) ((void *)((char *)(uintptr_t)step->weights + INT64_C(offset)))
#define SYMBOLS \\
{symbols}
#define ENTER(context) \\
    const LlmcStep *step = context; \\
    SYMBOLS

{bodies}
static int64_t now(void)
{{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}}

#define RUN(index, guard, units, grain) \\
    if (guard) {{ \\
        const int64_t start = step->profile ? now() : 0; \\
        llmc_parallel(body_##index, (void *)(uintptr_t)step, units, grain); \\
        if (step->profile) \\
            step->profile[index] += now() - start; \\
    }}

int llmc_step(const LlmcStep *step)
{{
    const int wrong = llmc_check_step(step, &limits);
    if (wrong)
        return wrong;
    SYMBOLS
{steps}
    return 0;
}}
"""
