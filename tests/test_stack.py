"""What kernels take of a thread's stack: as much as is stated, and never more than a thread is sure to have."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_decoder import small_decoder
from x86_machines import MACHINES, runnable

from llmc.compiler.options import CompileOptions
from llmc.compiler.pipeline import run_pipeline
from llmc.errors import CompileError
from llmc.targets import lower, machine_named
from llmc.targets.cpu.attention_problem import AttentionProblem
from llmc.targets.cpu.attention_tile import AttentionTile
from llmc.targets.cpu.codegen import build_module, object_code
from llmc.targets.cpu.library import kernels_of
from llmc.targets.cpu.linear_problem import QuantizedProblem
from llmc.targets.cpu.linear_quantized import QuantizedRows
from llmc.targets.cpu.stack import MOST_STACK_BYTES, stack_bytes
from llmc.targets.kernel import Kernel
from llmc.targets.machine import Machine
from llmc.targets.x86.attention_matrix import AttentionMatrix

# Saved and spilled registers: at most as many of them as a block of code has values, 64 bytes each. And alignment.
SPILLED = 8 << 10


def attention(machine: Machine, head_dim: int, value_dim: int, **other: Any) -> Kernel:
    template = AttentionMatrix if machine.has("amx-bf16") else AttentionTile
    facts = {"heads": 16, "kv_heads": 1, "scale": 0.1, **other}
    problem = AttentionProblem(head_dim=head_dim, value_dim=value_dim, **facts)
    return template.default(problem, machine).kernel(problem, machine)


def wide_linear(machine: Machine, k: int) -> Kernel:
    """Sums of 16 rows, which keep a number of each group."""
    problem = QuantizedProblem(n=16, k=k, bits=4, group=32, symmetric=True)
    rows = QuantizedRows(
        rows=1, tiles=1, slices=1, row_block=16, unroll=8, chains=2, ahead=3072, least=32 << 10, together=1
    )
    return rows.kernel(problem, machine)


def stated(item: Kernel, machine: Machine) -> int:
    return stack_bytes(item.build(machine))


def frames(kernels: list[Kernel], machine: Machine, folder: Path) -> dict[str, int]:
    """What each kernel takes of the stack, by its symbol: what its first instructions subtract from the pointer."""
    path = folder / "kernels.o"
    path.write_bytes(object_code(kernels, machine))
    text = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
    found: dict[str, int] = {}
    for part in re.split(r"^[0-9a-f]+ <", text, flags=re.MULTILINE)[1:]:
        symbol = part.partition(">")[0]
        taken = re.findall(r"\bsub\s+\$0x([0-9a-f]+),%rsp", part)
        found[symbol] = max((int(number, 16) for number in taken), default=0)
    return found


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not here")
@pytest.mark.parametrize("name", [name for name in ("avx2", "avx512vnni") if runnable(name)])
@pytest.mark.parametrize("kind", ["wide", *(pytest.param(q, marks=pytest.mark.slow) for q in ("none", "bf16", "int4"))])
def test_kernels_take_what_they_state(name: str, kind: str, tmp_path: Path) -> None:
    machine = MACHINES[name]
    if kind == "wide":
        kernels = [attention(machine, 256, 192), wide_linear(machine, 1 << 15)]
    else:
        graph = run_pipeline(small_decoder(), CompileOptions(quantization=kind)).graph
        kernels = kernels_of(lower(graph, machine))
    taken = frames(kernels, machine, tmp_path)
    for item in kernels:
        assert taken[item.symbol] <= stated(item, machine) + SPILLED, item.describe()
        # Nearly all of it are arrays: what is stated is no mere bound.
        assert kind != "wide" or taken[item.symbol] > stated(item, machine) * 3 // 4 > SPILLED


@pytest.mark.parametrize("dims", [(128, 128), (512, 512), (576, 512)])
@pytest.mark.parametrize("name", ["x86-64-v3", "znver4", "sapphirerapids"])
def test_heads_as_wide_as_there_are_fit(name: str, dims: tuple[int, int]) -> None:
    """Those of latent attention too, whose keys are 576 wide; on tile registers as well, whether this computer has them
    or not."""
    machine = machine_named(name)
    for heads in ({"kv_heads": 1}, {"kv_heads": 16}, {"heads": 128, "kv_heads": 1}):
        assert stated(attention(machine, *dims, **heads), machine) <= MOST_STACK_BYTES


def test_what_no_thread_is_sure_to_have_is_refused() -> None:
    machine = MACHINES["avx2"]
    for item in (wide_linear(machine, 1 << 20), attention(machine, 2048, 2048)):
        with pytest.raises(CompileError, match=rf"^kernel {item.name}\(.*needs \d{{4}} KiB of stack.*--override.*$"):
            build_module(item, machine)
