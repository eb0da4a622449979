"""What PEFT's directories of adapters say (LoRA: Hu et al. 2021, arXiv 2106.09685): settings and names of tensors.

Both who merges an adapter into weights (`frontends/hf/lora.py`) and who loads one at run time (`runtime/lora.py`) read
them by this. Settings that ask for more than a product of two matrices are told apart by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from llmc.errors import LlmcError

PREFIX = "base_model.model."
PARTS = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight|\.bias)?\Z")
# Settings that say how an adapter was trained, or that whoever reads it asks for.
_HARMLESS = frozenset(
    (
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "megatron_config",
        "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    )
)  # fmt: skip
# Beginnings of training that leave the base model's weights as they are; others take a part out of them.
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
_MOST_RANK = 1 << 16


@dataclass(frozen=True)
class LoraSettings:
    """An adapter_config.json. where: its path, for messages. error: what is raised, in one line, for settings that are
    wrong. A setting that is null counts as left out."""

    values: Mapping[str, object]
    where: str
    error: type[LlmcError]

    def check(self) -> None:
        """Refuses settings by which an adapter is more than products that are added."""
        kind = self.values.get("peft_type")
        if not isinstance(kind, str) or kind.upper() != "LORA":
            raise self.wrong("peft_type", "'LORA': merge others with peft and compile the result")
        if self.values.get("init_lora_weights", True) not in _BEGINNINGS:
            raise self.wrong(
                "init_lora_weights", "true: it takes a part out of the base model's weights, so that it has to be "
                "merged with peft",
            )  # fmt: skip
        for name, value in self.values.items():
            if name not in _HARMLESS and value not in (None, False, [], {}, ""):
                raise self.error(
                    f"{self.where}: {name} is {value!r:.60}, which llmc does not know: merge the adapter with peft"
                )

    def wrong(self, name: str, expected: str) -> LlmcError:
        """What to raise for a setting that is not as expected."""
        return self.error(f"{self.where}: {name} is {self.values.get(name)!r:.60}, expected {expected}")

    def flag(self, name: str) -> bool:
        """true or false; false where it is left out."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return bool(value)

    def scale(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with `use_rslora` (Kalajdzievski 2023, arXiv 2312.03732), each by the first
        pattern that fits a module's name, as PEFT looks them up."""
        rank = self.rank(module)
        alpha = self._by_pattern("alpha_pattern", module, self.values.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.flag("use_rslora") else rank)

    def rank(self, module: str) -> float:
        """How many rows A has."""
        rank = self._by_pattern("rank_pattern", module, self._rank())
        if rank < 1:
            raise self.error(f"{self.where}: the rank of {module:.80} is {rank:g}, at least 1 is needed")
        return rank

    def _rank(self) -> int:
        value = self.values.get("r")
        if value is None:
            return 8
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANK:
            raise self.wrong("r", f"a whole number, 1 to {_MOST_RANK}")
        return value

    def _by_pattern(self, name: str, module: str, default: object) -> float:
        patterns = self.values.get(name)
        if patterns is not None and not isinstance(patterns, dict):
            raise self.wrong(name, "a JSON object")
        value = default
        for pattern, number in (patterns or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    value = number
                    break
            except re.error as error:
                raise self.error(f"{self.where}: {name} has the pattern {pattern!r:.60}: {error}") from None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) < 1e9:
            raise self.error(f"{self.where}: {name} or its default is {value!r:.40} for {module:.80}, no number")
        return value


def inner_name(tensor: str) -> str:
    """A tensor's name without what PEFT puts around the base model's modules."""
    return tensor.removeprefix(PREFIX).replace(".base_layer.", ".")


def find(wanted: str, names: Collection[str]) -> str | None:
    """The name of a weight or module, which may have or lack what stands in front of the base model's modules."""
    if wanted in names:
        return wanted
    found = [name for name in names if name.endswith(f".{wanted}") or wanted.endswith(f".{name}")]
    return found[0] if len(found) == 1 else None
