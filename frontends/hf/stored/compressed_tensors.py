"""The form of checkpoints of compressed-tensors, which llm-compressor writes and vLLM reads.

A layer has one of
- weight_packed i32 [outputs, words], integers of 2, 3, 4 or 8 bits along the inputs, 2^(bits - 1) added; weight_shape;
- weight i8 [outputs, inputs];
- weight in floats of 8 bits;
and weight_scale [outputs, groups], [outputs, 1], [1], or, of floats, one for each block of rows and columns. Zero
points: weight_zero_point, packed along the outputs or i8; weight_g_idx: each input's group. w = (q - zero) * scale.
"""

from __future__ import annotations

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.activations import activations_note
from llmc.frontends.hf.stored.packing import PACKED_BITS, Module, blocks_of, modules_with, unpack
from llmc.frontends.hf.stored.scaled_floats import FLOATS_OF_8, scaled_floats
from llmc.frontends.hf.stored.settings import ADVICE, Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
# What layers have beside their weight, none of which is a weight of the model.
_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
_OF_ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
_ACTIVATIONS = (*_OF_ACTIVATIONS, "k_scale", "v_scale", "q_scale")
_SCALES = ("f32", "f16", "bf16")


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a checkpoint of compressed-tensors, and what a user should know of them."""
    _check(settings)
    symmetric = _symmetry(settings)
    bits, sizes = _bits_and_sizes(settings)
    blocks = _blocks_of_floats(settings, sizes)
    integers: dict[str, StoredIntegers] = {}
    floats: dict[str, Part] = {}
    modules = modules_with(file, "weight_scale")
    for module in modules:
        _check_zero_points(module, symmetric, settings)
        name = f"{module.name}.weight"
        if module.has("weight_packed"):
            found = integers[name] = _packed(module, bits, sizes)
            _check_packed_zero_points(module, found, symmetric, settings)
        elif not module.has("weight"):
            raise module.wrong("it has a weight_scale, but neither weight_packed nor weight")
        elif module.dtype("weight") == "i8":
            integers[name] = _bytes(module, sizes)
        elif module.dtype("weight") in FLOATS_OF_8:
            floats[name] = _floats(module, blocks)
        else:
            raise module.wrong(f"its weight is {module.dtype('weight')} beside a weight_scale: it is not compressed")
    if not modules and settings.text("format") != "dense":
        raise FrontendError(
            f"{settings.where} says compressed-tensors, but no layer of the checkpoint has a weight_scale"
        )
    left_out = sum(name.rpartition(".")[2] in _OF_ACTIVATIONS for name in file.names)
    notes = _notes(settings, file, len(floats), left_out)
    made = {*integers, *floats}
    parts = [f"{m.name}.{part}" for m in modules for part in (*_PARTS, "weight") if m.has(part)]
    parts += [name for name in file.names if name.rpartition(".")[2] in _ACTIVATIONS and name not in made]
    return StoredWeights(file, integers, floats, parts), notes


def _check(settings: Settings) -> None:
    """FrontendError for what changes more than how weights are stored."""
    formats = [settings, *(group for _, group in _groups(settings))]
    for described in formats:
        described.choice("format", _READ, "dense")
    settings.ignore(
        "ignore", "quantization_status", "global_compression_ratio", "version", "run_compressed", "dequantize",
        "use_optimized_inference", "kv_cache_scheme",
    )  # fmt: skip
    for _, group in _groups(settings):
        group.ignore("targets")  # tensors show which layers are quantized
        for part in ("weights", "input_activations", "output_activations"):
            _check_args(group.inner(part), part == "weights")
    settings.refuse("moe_sparsity_config", "takes experts away")
    sparsity = settings.inner("sparsity_config")
    if sparsity is not None:
        sparsity.ignore("targets", "ignore", "global_sparsity", "sparsity_structure", "registry_requires_subclass")
        sparsity.expect("format", "dense", why="sparse weights are not read")
    transforms = settings.inner("transform_config")
    if transforms is not None and transforms.get("config_groups"):
        raise FrontendError(
            f"{settings.where}: transform_config turns activations while the model runs, which is not read: {ADVICE}"
        )


def _check_args(args: Settings | None, of_weights: bool) -> None:
    """What is not read off the tensors of weights, nor told of activations."""
    if args is None:
        return
    args.ignore("observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder", "block_structure", "group_size")
    args.choice("type", ("int", "float"), "int")
    args.flag("symmetric", True)
    args.integer("num_bits", 8, 1, 64)
    strategies = ("tensor", "channel", "group", "block")
    args.choice("strategy", strategies if of_weights else (*strategies, "token", "tensor_group", "attn_head"), "tensor")
    if of_weights:
        args.expect("dynamic", False, why="weights have scales in the file")
    elif args.get("dynamic") not in (None, True, False, "local"):
        raise args.wrong("dynamic", "true, false or 'local'")


def _symmetry(settings: Settings) -> set[bool]:
    """What the groups of layers say: whether zero points are the middle of their range."""
    weights = (group.inner("weights") for _, group in _groups(settings))
    return {each.flag("symmetric", True) for each in weights if each is not None}


def _check_zero_points(module: Module, symmetric: set[bool], settings: Settings) -> None:
    """FrontendError where a layer's tensors are not as all groups of layers say."""
    stored = module.has("weight_zero_point")
    if symmetric == {False} and not stored:
        raise module.wrong(f"it has no weight_zero_point, but {settings.where} says symmetric: false")
    raw = stored and module.dtype("weight_zero_point") != "i32"
    if symmetric == {True} and raw and module.load("weight_zero_point").astype(np.float32).any():
        raise module.wrong(f"it has zero points that are not 0, but {settings.where} says symmetric: true")


def _check_packed_zero_points(module: Module, found: StoredIntegers, symmetric: set[bool], settings: Settings) -> None:
    """The same of zero points that are packed: 0 is the middle of the integers."""
    if symmetric == {True} and isinstance(found.zeros, Part) and (found.zeros.load() != 1 << found.bits - 1).any():
        raise module.wrong(f"it has zero points that are not 0, but {settings.where} says symmetric: true")


def _groups(settings: Settings) -> list[tuple[str, Settings]]:
    """The groups of layers that are quantized alike."""
    found = settings.inner("config_groups")
    if found is None:
        return []
    groups = []
    for name, group in found.values.items():
        # A preset's name may stand in the place of its settings, with the layers that it is for.
        inner = None if isinstance(group, list) else found.inner(name)
        if isinstance(group, list):
            found.ignore(name)
        if inner is not None:
            groups.append((name, inner))
    return groups


def _bits_and_sizes(settings: Settings) -> tuple[set[int], set[int]]:
    """The bits of weights and the inputs of a group that the settings know; the tensors say which layer has which."""
    bits, sizes = set[int](), set[int]()
    for _, group in _groups(settings):
        weights = group.inner("weights")
        if weights is not None:
            bits.add(weights.integer("num_bits", 8, 1, 64))
            sizes.add(weights.integer("group_size", -1, -1, 1 << 24))
    return bits, {size for size in sizes if size > 0}


def _blocks_of_floats(settings: Settings, sizes: set[int]) -> list[tuple[int, int]]:
    """Rows and columns of the blocks that the settings know. sizes: columns of groups, which are of one row."""
    found = {(1, size) for size in sizes}
    for _, group in _groups(settings):
        weights = group.inner("weights")
        if weights is None:
            continue
        block = weights.values.get("block_structure")
        if isinstance(block, str):  # as its older versions wrote it: 128x128
            block = [int(part) if part.isdecimal() and len(part) < 9 else 0 for part in block.split("x")]
        if (
            isinstance(block, (list, tuple))
            and len(block) == 2
            and all(type(n) is int and 1 <= n < 1 << 24 for n in block)
        ):
            found.add((block[0], block[1]))
        elif block is not None:
            raise weights.wrong("block_structure", "two positive whole numbers")
    return sorted(found)


def _floats(module: Module, blocks: list[tuple[int, int]]) -> Part:
    """Floats of 8 bits by the only blocks that fit; FrontendError where none or several do."""
    made: list[Part] = []
    for block in (None, *blocks):
        try:
            made.append(scaled_floats(module, "weight", "weight_scale", block))
        except FrontendError:
            if block is None and not blocks:
                raise
            continue
        if block is None:
            return made[0]
    if len(made) != 1:
        raise module.wrong(
            f"its weight_scale of {list(module.shape('weight_scale'))} does not fit its weight of "
            f"{list(module.shape('weight'))} in one of the blocks that the settings say: {blocks}"
        )
    return made[0]


def _packed(module: Module, known: set[int], sizes: set[int]) -> StoredIntegers:
    module.require("weight_packed", (-1, -1), "i32")
    module.require("weight_shape", (2,), "i64", "i32")
    outputs, words = module.shape("weight_packed")
    rows, inputs = (int(size) for size in module.load("weight_shape"))
    if rows != outputs or inputs < 1:
        raise module.wrong(f"its weight_shape is [{rows}, {inputs}], its weight_packed has {outputs} rows")
    fitting = [bits for bits in PACKED_BITS if -(-inputs * bits // 32) == words and (not known or bits in known)]
    if len(fitting) != 1:
        raise module.wrong(
            f"its {words} words a row do not hold {inputs} integers of {_listed(known)} bits: of 2, 3, 4 and 8 bits, "
            "they lie one behind the other"
        )
    bits = fitting[0]
    middle = 1 << (bits - 1)

    def zeros(stored: Array) -> Array:
        """u8 [outputs, groups] of words [packed outputs, groups], or of signed ones."""
        if stored.dtype == np.int8:
            return (stored.astype(np.int16) + middle).astype(np.uint8)
        return np.ascontiguousarray(unpack(stored.T, bits, outputs).T)

    def integers(packed: Array, order: Array | None) -> Array:
        q = unpack(packed, bits, inputs)
        return q if order is None else q[:, order]

    block, order, groups = _blocks(module, inputs, sizes)
    points: Part | int = middle
    if module.has("weight_zero_point"):
        packed = module.dtype("weight_zero_point") == "i32"
        shape = (-(-outputs * bits // 32), groups) if packed else (outputs, groups)
        module.require("weight_zero_point", shape, "i32" if packed else "i8")
        points = Part((outputs, groups), "u8", module.later("weight_zero_point", zeros))
    return StoredIntegers(
        q=Part((outputs, inputs), "u8", module.later("weight_packed", lambda packed: integers(packed, order))),
        scales=_scales(module),
        zeros=points,
        block=block,
        bits=bits,
        what=f"{bits} bits (compressed-tensors)",
        order=None if order is None else Part(order.shape, "i32", lambda: order),
    )


def _bytes(module: Module, sizes: set[int]) -> StoredIntegers:
    module.require("weight", (-1, -1), "i8")
    outputs, inputs = module.shape("weight")
    block, order, _ = _blocks(module, inputs, sizes)
    points: Part | None = None
    if module.has("weight_zero_point"):
        scale = module.shape("weight_scale")
        module.require("weight_zero_point", scale, "i8", "i32", "i64")
        shape = _scales(module).shape
        points = Part(
            shape, module.dtype("weight_zero_point"), module.later("weight_zero_point", lambda z: z.reshape(shape))
        )
        if not points.load().any():
            points = None
    return StoredIntegers(
        q=Part((outputs, inputs), "i8", module.later("weight", lambda q: q if order is None else q[:, order])),
        scales=_scales(module),
        zeros=points,
        block=block,
        bits=8,
        what="8 bits (compressed-tensors)",
        order=None if order is None else Part(order.shape, "i32", lambda: order),
    )


def _scales(module: Module) -> Part:
    """[outputs, groups], or [1, 1] of one number."""
    shape = module.shape("weight_scale")
    wide = (1, 1) if int(np.prod(shape, dtype=np.int64)) == 1 else (shape[0], 1) if len(shape) == 1 else shape
    if len(wide) != 2 or module.dtype("weight_scale") not in _SCALES:
        raise module.wrong(f"its weight_scale is {module.dtype('weight_scale')} {list(shape)}")
    return Part(
        (wide[0], wide[1]), module.dtype("weight_scale"), module.later("weight_scale", lambda s: s.reshape(wide))
    )


def _blocks(module: Module, inputs: int, sizes: set[int]) -> tuple[int, Array | None, int]:
    """Inputs of a group (0: all of a row), their order, and how many groups there are."""
    groups = _scales(module).shape[1]
    if groups == 1:
        return 0, None, 1
    fitting = [size for size in sizes if -(-inputs // size) == groups]
    if len(fitting) != 1:
        raise module.wrong(f"it has {groups} groups of {inputs} inputs, the settings say groups of {_listed(sizes)}")
    block = fitting[0]
    if not module.has("weight_g_idx"):
        return block, None, groups
    module.require("weight_g_idx", (inputs,), "i32", "i64")
    group_of = module.load("weight_g_idx").astype(np.int64)
    if (group_of < 0).any():  # what layers without an order of their own have there
        return block, None, groups
    found, order = blocks_of(module, group_of, groups)
    if found != block:
        raise module.wrong(f"its weight_g_idx has groups of different sizes, the settings say {block}")
    return block, order, groups


def _listed(numbers: set[int]) -> str:
    return " or ".join(str(number) for number in sorted(numbers)) or "any"


def _notes(settings: Settings, file: WeightSource, floats: int, left_out: int) -> tuple[str, ...]:
    """What of the checkpoint has no effect here."""
    notes = []
    if floats:
        notes.append(f"{floats} weights of the checkpoint are floats of 8 bits: -q rounds what they stand for")
    made_for = {
        _made_for(activations, part.startswith("output"))
        for _, group in _groups(settings)
        for part in ("input_activations", "output_activations")
        if (activations := group.inner(part)) is not None
    }
    notes += [activations_note(each, left_out) for each in sorted(made_for)]
    presets = settings.inner("config_groups")
    for name, group in {} if presets is None else presets.values.items():
        if isinstance(group, list):
            notes.append(activations_note(f"as the preset {name!r:.40} says"))
    if "kv_cache_scheme" in settings or any(name.endswith((".k_scale", ".v_scale")) for name in file.names):
        notes.append("the checkpoint's precision of the KV cache (kv_cache_scheme) is not used")
    return tuple(notes)


def _made_for(args: Settings, outputs: bool) -> str:
    """How activations were to be rounded."""
    kind = "floats" if args.choice("type", ("int", "float"), "int") == "float" else "integers"
    strategy = args.text("strategy").lower()
    some = f"every {args.get('group_size')!r:.20} inputs of a token"
    each = {"group": some, "tensor_group": some, "token": "each token"}.get(strategy, "all")
    found = "found while the model runs" if args.get("dynamic") else "fixed in the checkpoint"
    what = " (of outputs)" if outputs else ""
    return f"in {kind} of {args.integer('num_bits', 8, 1, 64)} bits{what}, {each} by a scale that is {found}"
