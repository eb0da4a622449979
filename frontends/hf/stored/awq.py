"""AWQ's form of a checkpoint, as AutoAWQ writes it: 4 bits, one scale and zero point for each group of inputs.

GEMM: qweight i32 [inputs, outputs / 8], qzeros i32 [groups, outputs / 8], scales [groups, outputs]; the eight outputs
of a word lie in it in the order 0 2 4 6 1 3 5 7. GEMV: qweight i32 [outputs, inputs / 8], qzeros i32 [outputs, any],
scales [outputs, any], of which the first groups count; inputs and groups lie in their order. w = (q - zero) * scale.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.gptq import check_settings, same_choice
from llmc.frontends.hf.stored.packing import Change, Module, modules_with, unpack
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

BITS = 4
# Versions whose files are laid out as those of GEMM: only the kernels that run them differ.
_AS_GEMM = ("gemm", "exllama", "exllamav2", "ipex")
_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word each of its eight outputs lies


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of an AWQ checkpoint."""
    version = same_choice(settings, ("version", "format", "checkpoint_format"), (*_AS_GEMM, "gemv"), "gemm")
    notes = _check(settings)
    name = "w_bit" if "w_bit" in settings else "bits"
    if settings.integer(name, BITS, 1, 64) != BITS:
        raise settings.wrong(name, f"{BITS}: no other is read")
    size = settings.integer("q_group_size" if "q_group_size" in settings else "group_size", 128, -1, 1 << 24)
    modules = modules_with(file, "qweight")
    if not modules:
        raise FrontendError(f"{settings.where} says awq, but the checkpoint has no layer with a qweight")
    stored = _gemv if version == "gemv" else _gemm
    integers = {f"{module.name}.weight": stored(module, size) for module in modules}
    parts = [f"{module.name}.{part}" for module in modules for part in ("qweight", "qzeros", "scales")]
    return StoredWeights(file, integers, {}, [*parts, *_scaled_activations(file, set(parts))]), tuple(notes)


def _check(settings: Settings) -> list[str]:
    """FrontendError for what changes more than how weights are stored; notes on what has no effect here."""
    for name in ("zero_point", "sym"):
        settings.flag(name, True)  # every layer has zero points, symmetric or not
    settings.expect("desc_act", False, why="AWQ's layers have no order of inputs")
    if settings.text("backend").lower() in ("llm-awq", "gemv_fast"):
        raise settings.wrong("backend", "'autoawq': the layout of llm-awq is not read")
    settings.ignore("do_fuse", "fuse_max_seq_len", "modules_to_fuse", "scale_search_chunked_activations")
    return check_settings(settings)


def _scaled_activations(file: WeightSource, parts: set[str]) -> list[str]:
    """Scales that activations are divided by, where they are all 1; FrontendError where they are not."""
    found = [name for name in file.names if name.endswith(".scales") and name not in parts]
    for name in found:
        if (file.load(name) != 1).any():
            raise FrontendError(
                f"the checkpoint divides activations by {name:.100}, which is not read: compile the original that it "
                "was made from"
            )
    return found


def _blocks(module: Module, inputs: int, size: int) -> tuple[int, int]:
    """Inputs of a group, and how many groups there are."""
    block = inputs if size <= 0 else size
    if inputs < 1 or inputs % block:
        raise module.wrong(f"its {inputs} inputs are no whole groups of {block}")
    return block, inputs // block


def _gemm(module: Module, size: int) -> StoredIntegers:
    module.require("qweight", (-1, -1), "i32")
    inputs, words = module.shape("qweight")
    outputs = words * 8
    block, groups = _blocks(module, inputs, size)
    module.require("qzeros", (groups, words), "i32")
    module.require("scales", (groups, outputs), "f16", "bf16", "f32")

    def integers(packed: Array) -> Array:
        """u8 [outputs, n] of words [n, outputs / 8]."""
        q = unpack(packed, BITS, outputs).reshape(len(packed), words, 8)[..., _PLACES]
        return np.ascontiguousarray(q.reshape(len(packed), outputs).T)

    return _stored(module, (outputs, inputs, groups), block, integers, integers, np.transpose)


def _gemv(module: Module, size: int) -> StoredIntegers:
    module.require("qweight", (-1, -1), "i32")
    outputs, words = module.shape("qweight")
    inputs = words * 8
    block, groups = _blocks(module, inputs, size)
    module.require("qzeros", (outputs, -1), "i32")
    module.require("scales", (outputs, -1), "f16", "bf16", "f32")
    if module.shape("qzeros")[1] * 8 < groups or module.shape("scales")[1] < groups:
        raise module.wrong(f"its zero points or scales are of less than its {groups} groups")
    return _stored(
        module,
        (outputs, inputs, groups),
        block,
        lambda packed: unpack(packed, BITS, inputs),
        lambda packed: unpack(packed, BITS, groups),
        lambda scales: scales[:, :groups],
    )


def _stored(
    module: Module, sizes: tuple[int, int, int], block: int, integers: Change, zeros: Change, scales: Change
) -> StoredIntegers:
    """sizes: outputs, inputs, groups. integers, zeros, scales: from the file's tensors to [outputs, ...]."""
    outputs, inputs, groups = sizes
    points = zeros(module.load("qzeros"))
    same = int(points.flat[0]) if (points == points.flat[0]).all() else None
    return StoredIntegers(
        q=Part((outputs, inputs), "u8", module.later("qweight", integers)),
        scales=Part((outputs, groups), module.dtype("scales"), module.later("scales", scales)),
        zeros=Part((outputs, groups), "u8", module.later("qzeros", zeros)) if same is None else same,
        block=0 if groups == 1 else block,
        bits=BITS,
        what=f"{BITS} bits (awq)",
    )
