"""Artifacts in one process, however they are loaded: each runs its own code, and what runs is not unloaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fake_artifact import compile_library
from kernel_harness import CACHE

from llmc.compiler.ir.elementwise import Mul
from llmc.compiler.ir.graph import Graph
from llmc.compiler.ir.op import Input
from llmc.compiler.ir.types import Tensor
from llmc.compiler.progress import Silent
from llmc.targets import lower, machine_named
from llmc.targets.cpu.library import INTERFACE, build_library, c_sources, kernels_of
from llmc.targets.cpu.limits import limit_kernels
from llmc.targets.memory import plan_memory
from llmc.targets.step_limits import StepLimits
from llmc.targets.target import Addresses

# A step that says which library's it is, by way of the library's own pool.
STEP = """
#include "pool.h"
static void body(void *context, int64_t begin, int64_t end) {{
    __atomic_fetch_add((int *)context, {code} * (int)(end - begin), __ATOMIC_SEQ_CST);
}}
int llmc_step(const LlmcStep *step) {{
    int sum = 0;
    (void)step;
    llmc_parallel(body, &sum, 10, 1);
    return sum;
}}
"""
# Functions of the program's own come before those of libraries.
PROGRAM = """
#include <dlfcn.h>
#include "pool.h"
int llmc_step(const LlmcStep *step) { (void)step; return 7; }
void llmc_parallel(LlmcBody body, void *context, int64_t units, int64_t grain) {
    (void)body, (void)context, (void)units, (void)grain;
}
static int run(const char *path) {
    int (*function)(const LlmcStep *, int64_t) = dlsym(dlopen(path, RTLD_NOW | RTLD_NOLOAD), "llmc_run");
    return function(&(LlmcStep){0}, 1);
}
int main(int count, char **paths) {
    return !(count == 3 && run(paths[1]) == 10 && run(paths[2]) == 20 && llmc_run(0, 1) == 10);
}
"""
LOADED_GLOBALLY = """
import ctypes, sys
first, second = (ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in sys.argv[1:])
for library in (first, second):
    library.llmc_pool_create.restype = ctypes.c_void_p
    assert library.llmc_pool_create()
found = [library.llmc_run(bytes(400), ctypes.c_int64(2)) for library in (first, second)]
assert found == [10, 20], found
"""
# The pool of a library that is closed serves another; one that made no pool goes.
CLOSED = """
#include <dlfcn.h>
#include "pool.h"
#define GET(handle, name) ((__typeof__(&name))dlsym(handle, #name))
int main(int count, char **paths) {
    if (count != 3) return 1;
    void *first = dlopen(paths[1], RTLD_NOW), *second = dlopen(paths[2], RTLD_NOW);
    LlmcPool *pool = GET(first, llmc_pool_create)();
    if (!pool || GET(first, llmc_run)(&(LlmcStep){0}, 3) != 10) return 2;
    GET(second, llmc_pool_use)(pool);
    dlclose(first);
    if (GET(second, llmc_run)(&(LlmcStep){0}, 3) != 20) return 3;
    dlclose(second);
    return dlopen(paths[2], RTLD_NOW | RTLD_NOLOAD) ? 4 : 0;
}
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    return [str(compile_library(STEP.format(code=code), folder)) for code, folder in enumerate(folders, 1)]


def program(source: str, folder: Path, *libraries: str) -> str:
    code, binary = folder / "main.c", folder / "main"
    code.write_text(source)
    sources = c_sources()
    command = ["gcc", "-std=gnu11", f"-I{sources}", str(code), "-o", str(binary), "-Wl,--no-as-needed"]
    subprocess.run([*command, *libraries, "-ldl"], check=True)
    return str(binary)


def inspected(option: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", option, str(path)], check=True, capture_output=True, text=True).stdout


def exported(path: Path) -> set[str]:
    lines = [line.split() for line in inspected("--dyn-syms", path).splitlines()]
    return {
        parts[7].split("@")[0]
        for parts in lines
        if len(parts) > 7 and parts[4] in ("GLOBAL", "WEAK") and parts[6].isdecimal()
    }


def test_two_artifacts_linked_into_one_program_run_their_own_code(pair: list[str], tmp_path: Path) -> None:
    subprocess.run([program(PROGRAM, tmp_path, *pair), *pair], check=True)


def test_two_artifacts_loaded_globally_run_their_own_code(pair: list[str]) -> None:
    subprocess.run([sys.executable, "-c", LOADED_GLOBALLY, *pair], check=True)


def test_the_code_of_a_pool_stays_and_other_code_goes(pair: list[str], tmp_path: Path) -> None:
    subprocess.run([program(CLOSED, tmp_path), *pair], check=True)


def test_an_artifact_shows_what_others_may_call_and_looks_up_nothing_of_its_own(tmp_path: Path) -> None:
    """Names that it looked up could be answered by others; the tables of those that it must are read-only."""
    x, machine = Input("x", Tensor((4,), "f32")), machine_named("native")
    program = lower(Graph("main", (x,), (("out", Mul(x, x)),)), machine)
    addresses = Addresses(plan_memory(program, {}), {}, {}, "run", StepLimits())
    path = build_library(program, addresses, CACHE, tmp_path, Silent()).path
    kernels = [item.symbol for item in kernels_of(program)]
    limits = [item.kernel.symbol for item in limit_kernels(machine)]
    assert kernels and exported(path) == {*INTERFACE, *kernels, *limits}
    about = inspected("-dlr", path)
    assert not [line for line in about.splitlines() if "llmc_" in line]
    assert all(word in about for word in ("GNU_RELRO", "SYMBOLIC", "BIND_NOW"))
