"""Kernels to object code: TIR through TVM's LLVM code generator.

The default TVM pipeline wraps every function in the packed calling convention, which checks arguments, needs TVM's
runtime symbols and hides aliasing facts from LLVM. Kernels here are plain C functions, so the pipeline below stops
before that: it lowers buffers, vectors and unrolled loops, and emits the function as it stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from llmc.targets.cpu.stack import check_stack
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine

if TYPE_CHECKING:
    import tvm


def llvm_target(machine: Machine) -> tvm.target.Target:
    """TVM's target for a CPU machine."""
    import tvm

    facts = {"kind": "llvm", "mtriple": machine.triple, "mcpu": machine.mcpu, "mattr": machine.attributes()}
    return tvm.target.Target(facts | {"opt-level": 3})


def build_module(kernel: Kernel, machine: Machine) -> tvm.runtime.Module:
    """Generate code for one kernel. The module's `inspect_source("ll" or "asm")` shows it."""
    return _build([kernel], machine)


def _build(kernels: Iterable[Kernel], machine: Machine) -> tvm.runtime.Module:
    """Generate code for kernels with different symbols, as one module."""
    import tvm
    from tvm import tirx

    target = llvm_target(machine)
    functions, names = {}, {}
    for item in kernels:
        names[item.symbol] = item.describe()
        function = item.build(machine)
        attributes = {"global_symbol": item.symbol, "target": target, "tirx.noalias": True}
        functions[item.symbol] = function.with_attr(attributes)
    passes = [
        tirx.transform.StmtSimplify(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerIntrin(),
    ]
    with target:
        module = tvm.transform.Sequential(passes)(tvm.IRModule(functions))
        for symbol, name in names.items():
            check_stack(name, module[symbol])
        return tvm.get_global_func("target.build.llvm")(module, target)


def object_code(kernels: Iterable[Kernel], machine: Machine) -> bytes:
    """One object file with several kernels, past the cache: half the time of one file each where kernels are small."""
    return _object_code(_build({item.symbol: item for item in kernels}.values(), machine))


def _object_code(module: tvm.runtime.Module) -> bytes:
    """The object file of a module, by way of memory: LLVM ends the process when a disk that it writes to is full."""
    handle = os.memfd_create("llmc-object")
    try:
        module.write_to_file(f"/proc/self/fd/{handle}", "o")
        return os.pread(handle, os.fstat(handle).st_size, 0)
    finally:
        os.close(handle)
