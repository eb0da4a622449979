"""GPTQ's form of a checkpoint: AutoGPTQ's, version 1, and GPTQModel's, version 2.

A layer has qweight i32 [inputs * bits / 32, outputs], packed along the inputs; scales [groups, outputs]; qzeros i32
[groups, outputs * bits / 32], packed along the outputs; g_idx i32 [inputs], the group of each input (left out in old
files: inputs in their order). Version 1 stores zero points minus one. w = scales[g_idx] * (q - zeros[g_idx]).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmc.compiler.ir.types import Array
from llmc.errors import FrontendError
from llmc.frontends.hf.stored.activations import activations_note
from llmc.frontends.hf.stored.packing import PACKED_BITS, Module, blocks_of, modules_with, unpack
from llmc.frontends.hf.stored.settings import Settings
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import Part, StoredIntegers, StoredWeights

FORMATS = ("gptq", "gptq_v2")
FIRST, SECOND = "version 1 (zero points minus one)", "version 2 (zero points as they are)"
MISTAKEN = "version 1 as older versions of GPTQModel wrote 3 bits"
# What was taken off the words that zero points of so many bits fill: one off each integer, and something else by
# versions of GPTQModel that had the words of 3 bits in the wrong order.
_ONES = {2: (0x55555555,), 4: (0x11111111,), 8: (0x01010101,)}
_WRONG_ONES = (0x24924924, 0x92492492, 0x49249249)
# How GPTQModel, AutoGPTQ, optimum and AutoRound found the integers, which layers they did, and which code runs them.
PROCESS = (
    "true_sequential", "damp_percent", "damp_auto_increment", "act_group_aware", "static_groups", "mse", "hessian",
    "gptaq", "foem", "fallback", "meta", "dataset", "tokenizer", "batch_size", "pad_token_id", "cache_block_outputs",
    "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize", "lm_head",
    "model_seqlen", "max_input_length", "model_name_or_path", "model_file_base_name", "quantizer", "provider",
    "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "pack_impl", "device",
    "modules_to_not_convert", "dataset_split", "n_samples", "autoround_version", "iters", "lr", "minmax_lr",
    "nsamples", "seqlen", "low_gpu_mem_usage", "amp", "scale_dtype", "enable_minmax_tuning", "enable_quanted_input",
    "enable_norm_bias_tuning", "gradient_accumulate_steps", "quant_block_list", "to_quant_block_names", "train_bs",
    "not_use_best_mse", "backend", "nblocks", "low_cpu_mem_usage", "enable_torch_compile", "enable_alg_ext",
    "supported_types", "dynamic_max_gap", "use_quant_input", "lr_scheduler", "sampler", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """A layer's settings, read off its tensors. order: inputs by group, None where they come so already; block: inputs
    of each group, 0 where groups have different numbers of inputs."""

    module: Module
    bits: int
    inputs: int
    outputs: int
    groups: int
    block: int
    order: Array | None
    group_of: Array


def read(settings: Settings, file: WeightSource) -> tuple[StoredWeights, tuple[str, ...]]:
    """The weights of a GPTQ checkpoint, and what a user should know of them."""
    form = same_choice(settings, ("checkpoint_format", "format"), FORMATS, "gptq")
    settings.integer("bits", 4, 2, 8)
    settings.integer("group_size", -1, -1, 1 << 24)
    notes = check_settings(settings)
    modules = modules_with(file, "qweight")
    if not modules:
        raise FrontendError(f"{settings.where} says gptq, but the checkpoint has no layer with a qweight")
    layers = [_layer(module, settings) for module in modules]
    notes += _order_notes(layers, settings)
    version = _version(layers, settings, SECOND if form == "gptq_v2" else FIRST, notes)
    integers: dict[str, StoredIntegers] = {}
    floats: dict[str, Part] = {}
    for layer in layers:
        name = f"{layer.module.name}.weight"
        if layer.block:
            integers[name] = _stored(layer, version)
        else:
            floats[name] = _uneven(layer, version)
    if floats:
        notes.append(
            f"{len(floats)} weights of the checkpoint have groups of different sizes (g_idx): their integers are not "
            "kept, -q rounds them anew"
        )
    parts = [f"{m.name}.{part}" for m in modules for part in ("qweight", "qzeros", "scales", "g_idx") if m.has(part)]
    return StoredWeights(file, integers, floats, parts), tuple(notes)


def same_choice(settings: Settings, names: tuple[str, ...], known: tuple[str, ...], default: str) -> str:
    """A setting that has several names; FrontendError where they say different things."""
    found = {name: settings.choice(name, known, default) for name in names if name in settings}
    for name, value in found.items():
        if value != next(iter(found.values())):
            raise settings.wrong(name, f"{next(iter(found.values()))!r}, as {next(iter(found))} says")
    return next(iter(found.values()), default)


def check_settings(settings: Settings) -> list[str]:
    """What files of GPTQModel's have in common. FrontendError for what changes more than how weights are stored; notes
    on what has no effect here."""
    settings.expect("pack_dtype", "int32")
    settings.expect("is_marlin_format", False, why="Marlin's layout is not read")
    settings.expect("data_type", "int")
    settings.expect("act_bits", 16, 32, why="rounded activations of AutoRound are not read")
    settings.expect("act_data_type", "float", "float16", "bfloat16")
    settings.ignore("act_group_size", "act_sym", "act_dynamic", "super_bits", "super_group_size")
    settings.refuse("rotation", "turns activations while the model runs")
    _check_layer_settings(settings)
    for rules in ("dynamic", "extra_config"):
        for _, rule in settings.each(rules):
            rule.ignore("bits", "group_size", "sym", "desc_act")  # as the layer's tensors show
            rule.expect("data_type", "int")
            rule.expect("act_bits", 16, 32, why="rounded activations of AutoRound are not read")
            _check_layer_settings(rule)
    made_for = settings.get("activation")
    return [activations_note(f"rounded as GPTQModel's `activation` says, {made_for!r:.80}")] if made_for else []


def _check_layer_settings(settings: Settings) -> None:
    settings.ignore(*PROCESS)
    settings.refuse("adapter", "adds a low-rank product to a layer's output")


def _order_notes(layers: list[_Layer], settings: Settings) -> list[str]:
    """Whether inputs have an order of their own is read off g_idx, which programs do not all do."""
    ordered = sum(layer.order is not None for layer in layers)
    asked = settings.flag("desc_act", False)
    if asked and any(layer.groups > 1 and not layer.module.has("g_idx") for layer in layers):
        raise settings.wrong("desc_act", "false: some layers have no g_idx, which would be the order of their inputs")
    if ordered and not asked and "dynamic" not in settings:
        return [f"{ordered} weights have inputs in an order of their own (g_idx) though desc_act is false: it is kept"]
    return []


def _layer(module: Module, settings: Settings) -> _Layer:
    """Sizes are the tensors' own: settings of single layers (`dynamic`) then need not be matched by name."""
    module.require("qweight", (-1, -1), "i32")
    words, outputs = module.shape("qweight")
    expected = settings.integer("bits", 4, 2, 8)
    if module.has("g_idx"):
        module.require("g_idx", (-1,), "i32", "i64")
        (inputs,) = module.shape("g_idx")
        bits = words * 32 // inputs if inputs else 0
    else:
        bits, inputs = expected, words * 32 // expected
    if bits not in PACKED_BITS or words * 32 != bits * inputs:
        raise module.wrong(
            f"its qweight has {words} rows for {inputs} inputs, {bits} bits each: 2, 3, 4 and 8 bits are read"
        )
    if bits != expected and "dynamic" not in settings:
        raise module.wrong(f"its integers have {bits} bits, but {settings.where} says {expected}")
    module.require("scales", (-1, outputs), "f16", "bf16", "f32")
    groups = module.shape("scales")[0]
    if (outputs * bits) % 32:
        raise module.wrong(f"its {outputs} outputs, of {bits} bits each, fill no whole words of zero points")
    module.require("qzeros", (groups, outputs * bits // 32), "i32")
    block, order, group_of = _grouping(module, settings, inputs, groups)
    return _Layer(module, bits, inputs, outputs, groups, block, order, group_of)


def _grouping(module: Module, settings: Settings, inputs: int, groups: int) -> tuple[int, Array | None, Array]:
    """How many inputs a group has, 0 if they differ; the inputs in the order of their groups; each one's group."""
    if module.has("g_idx"):
        group_of = module.load("g_idx").astype(np.int64)
    else:
        size = settings.integer("group_size", -1, -1, 1 << 24)
        size = inputs if size <= 0 else size
        if -(-inputs // size) != groups:
            raise module.wrong(f"it has {groups} groups, but {settings.where} says groups of {size} of {inputs} inputs")
        group_of = np.arange(inputs) // size
    block, order = blocks_of(module, group_of, groups)
    return block, order, group_of


def _version(layers: list[_Layer], settings: Settings, labelled: str, notes: list[str]) -> str:
    """How zero points are stored. Symmetric ones are the middle of their range, which decides; of others the label has
    to be believed."""
    found = [
        version for version in (FIRST, SECOND, MISTAKEN) if all(_in_the_middle(layer, version) for layer in layers)
    ]
    symmetric = settings.flag("sym", True)
    if symmetric and found and labelled not in found:
        notes.append(
            f"the checkpoint is labelled GPTQ {labelled}, but its zero points, all in the middle, are those of "
            f"{found[0]}: read as such"
        )
        return found[0]
    if symmetric and not found:
        notes.append(f"zero points differ though the checkpoint says that they are symmetric: read as GPTQ {labelled}")
    if not symmetric:
        notes.append(f"zero points are read as those of GPTQ {labelled}, as the checkpoint is labelled")
    if labelled != SECOND and any(_wraps(layer) for layer in layers):
        notes.append(
            "some stored zero points are the greatest number that their bits hold, which programs read differently in "
            "version 1: read as GPTQModel does"
        )
    return labelled


def _in_the_middle(layer: _Layer, version: str) -> bool:
    zeros = _zeros(layer.module.load("qzeros"), layer.bits, layer.outputs, version)
    return bool((zeros == 1 << (layer.bits - 1)).all())


def _wraps(layer: _Layer) -> bool:
    stored = unpack(layer.module.load("qzeros"), layer.bits, layer.outputs)
    return bool((stored == (1 << layer.bits) - 1).any())


def _zeros(words: Array, bits: int, outputs: int, version: str) -> Array:
    """Zero points u8 [groups, outputs]. Version 1: one is added to whole words, with carries, as GPTQModel does, but
    of 3 bits to each by itself."""
    if bits == 3 and version == FIRST:
        return (unpack(words, bits, outputs) + np.uint8(1)) & np.uint8(7)
    if version == SECOND:
        return unpack(words, bits, outputs)
    words = np.ascontiguousarray(words).view(np.uint32)
    ones = np.array(_WRONG_ONES if bits == 3 else _ONES[bits], np.uint32)
    return unpack(words + np.resize(ones, words.shape[1]), bits, outputs)


def _points(layer: _Layer, version: str) -> Part | int:
    """The zero points u8 [outputs, groups], or the one that they all are."""
    module, bits, outputs = layer.module, layer.bits, layer.outputs
    zeros = _zeros(module.load("qzeros"), bits, outputs, version)
    if (zeros == zeros.flat[0]).all():
        return int(zeros.flat[0])

    def load(words: Array) -> Array:
        return np.ascontiguousarray(_zeros(words, bits, outputs, version).T)

    return Part((outputs, layer.groups), "u8", module.later("qzeros", load))


def _stored(layer: _Layer, version: str) -> StoredIntegers:
    module, bits, inputs, order = layer.module, layer.bits, layer.inputs, layer.order

    def integers(words: Array) -> Array:
        q = unpack(words.T, bits, inputs)
        return q if order is None else q[:, order]

    scales = module.later("scales", lambda values: np.ascontiguousarray(values.T))
    return StoredIntegers(
        q=Part((layer.outputs, inputs), "u8", module.later("qweight", integers)),
        scales=Part((layer.outputs, layer.groups), module.dtype("scales"), scales),
        zeros=_points(layer, version),
        block=0 if layer.groups == 1 else layer.block,
        bits=bits,
        what=f"{bits} bits (gptq)",
        order=None if order is None else Part(order.shape, "i32", lambda: order),
    )


def _uneven(layer: _Layer, version: str) -> Part:
    """A weight whose groups have different numbers of inputs, as floats."""
    points, module, at = _points(layer, version), layer.module, layer.group_of

    def load() -> Array:
        q = unpack(module.load("qweight").T, layer.bits, layer.inputs).astype(np.float32)
        q -= points.load()[:, at] if isinstance(points, Part) else np.float32(points)
        q *= module.load("scales").T.astype(np.float32)[:, at]
        return q

    return Part((layer.outputs, layer.inputs), "f32", load)
