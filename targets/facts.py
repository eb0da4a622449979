"""What an artifact is, as C: the `LlmcFacts` of `runtime/csrc/llmc.h`, made of the manifest's own entries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmc.runtime.sizes import Size, SizeError, parse_size

# What Linux calls a feature in /proc/cpuinfo, where it is not LLVM's name up to underscores.
_FLAGS = {
    "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "pclmul": "pclmulqdq", "rdrnd": "rdrand",
    "sahf": "lahf_lm", "bmi": "bmi1", "lzcnt": "abm", "sha": "sha_ni", "amx-tile": "amx_tile", "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16", "amx-fp16": "amx_fp16", "amx-complex": "amx_complex", "prfchw": "3dnowprefetch",
    "64bit": "lm", "neon": "asimd", "dotprod": "asimddp", "fullfp16": "asimdhp", "fp16fml": "asimdfhm",
    "lse": "atomics", "crc": "crc32", "rdm": "asimdrdm", "fp-armv8": "fp",
}  # fmt: skip
_TASKS = {"generate": "LLMC_GENERATE", "encode": "LLMC_ENCODE", "run": "LLMC_RUN"}
_STATES = {"paged": "LLMC_PAGED", "none": "LLMC_STATELESS", "ragged": "LLMC_RAGGED", "run": "LLMC_ARRAYS"}
_ELEMENT_BYTES = {"float16": 2, "float32": 4}

Json = Mapping[str, Any]


def cpu_flag(feature: str) -> str:
    """What Linux calls an LLVM feature; underscores count for nothing ("avx512vnni" is avx512_vnni there)."""
    return _FLAGS.get(feature, feature)


def facts_source(manifest: Json) -> str:
    """The C definition of `llmc_facts`. manifest: with all entries that do not depend on the linked library, and those
    in `step.failures`; an empty one makes facts of an artifact that does nothing."""
    step, encoder, context = manifest.get("step", {}), manifest.get("encoder") or {}, manifest.get("max_context", 0)
    target = manifest.get("target", {})
    features, adapters = sorted(target.get("features", ())), manifest.get("adapters") or {}
    names = [facts["name"] for facts in manifest.get("outputs", ())]
    values: dict[str, object] = {
        "bytes": "sizeof(LlmcFacts)",
        "task": _TASKS[manifest.get("task", "run")],
        "state": _STATES[step.get("state", "run")],
        "vocabulary": step.get("vocab_size", 0),
        "max_context": context,
        "max_step": step.get("max_step", 0),
        "page": step.get("page", 0),
        "tile": step.get("tile", 0),
        "max_splits": step.get("max_splits", 0),
        "part": step.get("part", 0),
        "row_kinds": int(step.get("row_kinds", False)),
        "arena_bytes": step.get("arena_bytes", 0),
        "weights_bytes": manifest.get("weights", {}).get("bytes", 0),
        "tile_registers": int(any(feature.startswith("amx-") for feature in features)),
        "architecture": c_string(target.get("arch", "")),
        "encoder_output": names.index(encoder["output"]) if encoder.get("output") in names else -1,
        "adapter_count": adapters.get("count", 0),
        "adapter_rank": adapters.get("rank", 0),
        "max_tokens": encoder.get("max_tokens", min(context, step.get("max_step", 0))),
    }
    lists = [
        _List("feature", "LlmcFeature", [f"{{{c_string(name)}, {c_string(cpu_flag(name))}}}" for name in features]),
        _List("layer", "LlmcLayerFacts", [_layer(facts) for facts in manifest.get("kv", {}).get("layers", ())]),
        _List("regime", "int64_t", [_number(value) for value in step.get("regimes", ())]),
        _List("failure", "char *const", [c_string(text) for text in step.get("failures", ())]),
        _List("output", "LlmcOutputFacts", [_output(facts) for facts in manifest.get("outputs", ())]),
        _List("adapter_table", "LlmcAdapterFacts", [_adapter_table(facts) for facts in adapters.get("tables", ())]),
    ]
    fields = [f".{name} = {_number(value) if isinstance(value, int) else value}" for name, value in values.items()]
    fields += [text for items in lists for text in items.fields()]
    arrays = [items.definition() for items in lists if items.values]
    body = "\n".join(f"    {field}," for field in fields)
    return "\n".join([*arrays, f"const LlmcFacts llmc_facts = {{\n{body}\n}};"])


class _List:
    """One of the facts' lists: `NAME_count` numbers of a type in `NAMEs`."""

    def __init__(self, name: str, kind: str, values: Sequence[str]) -> None:
        self.name, self.kind, self.values = name, kind, values

    def definition(self) -> str:
        items = "".join(f"\n    {value}," for value in self.values)
        return f"static const {self.kind} facts_{self.name}s[] = {{{items}\n}};"

    def fields(self) -> list[str]:
        found = [f".{self.name}_count = {len(self.values)}"]
        return [*found, f".{self.name}s = facts_{self.name}s"] if self.values else found


def _layer(facts: Json) -> str:
    numbers = (
        facts["kv_heads"], facts["head_dim"], facts["value_dim"], _ELEMENT_BYTES[facts["dtype"]],
        facts["window"] or 0,
    )  # fmt: skip
    return f"{{{', '.join(map(_number, numbers))}}}"


def _adapter_table(facts: Json) -> str:
    return f"{{{', '.join(map(_number, (facts['inputs'], facts['outputs'], len(facts['parts']))))}}}"


def _output(facts: Json) -> str:
    try:
        per, elements = _rows([parse_size(size) for size in facts["shape"]])
    except SizeError:  # an artifact that will be refused (`check_manifest`), or one that takes arrays
        per, elements = "LLMC_PER_OTHER", 0
    return f"{{{c_string(facts['name'])}, {c_string(facts['dtype'])}, {per}, {_number(elements)}}}"


def _rows(shape: Sequence[Size]) -> tuple[str, int]:
    """What an output has rows for, and how many numbers a row has: its sizes are numbers but for one that is the
    number of tokens (T, or S of a single sequence) or of sequences (B)."""
    per, elements = "LLMC_PER_CALL", 1
    for size in shape:
        (atom, *more) = size
        if more or (not isinstance(atom, int) and per != "LLMC_PER_CALL"):
            return "LLMC_PER_OTHER", 0
        if isinstance(atom, int):
            elements *= atom
        else:
            per = "LLMC_PER_SEQUENCE" if atom == "=B" else "LLMC_PER_TOKEN"
            if elements != 1:
                return "LLMC_PER_OTHER", 0
    return per, elements


def _number(value: object) -> str:
    return f"INT64_C({value})"


def c_string(text: str) -> str:
    """A C string literal of a text, in UTF-8."""
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode()
    )
    return f'"{plain}"'
