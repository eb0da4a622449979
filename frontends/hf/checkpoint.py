"""From a checkpoint's tensors to a model's weights: renamed, merged or split as transformers does on loading.

transformers has for each model a list of renamings and converters (regular expressions and operations on tensors). The
names are mapped when the checkpoint is opened; tensors are converted only when a weight is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llmc.compiler.ir.types import FLOATS, NUMPY_DTYPES, Array
from llmc.errors import FrontendError
from llmc.frontends.hf.config import quiet
from llmc.frontends.hf.source import MERGE
from llmc.frontends.hf.weights import STORED_CONSTANTS, is_finite, shortened, to_numpy, to_torch
from llmc.frontends.lifted import WeightSource
from llmc.frontends.stored_integers import StoredIntegers, stored_integers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# What PEFT calls its tensors in a model that was saved without merging them.
_ADAPTED = re.compile(
    r"(^|\.)(lora_[A-Za-z_]+|ia3_l|hada_w\w+|lokr_w\w+|oft_[RrSs]\w*|vera_lambda_\w+|base_layer)(\.|$)"
)


@dataclass(frozen=True)
class _Converted:
    """Weights that one converter makes from several tensors. sources: (tensor name, its pattern), in loading order."""

    converter: Any  # transformers.core_model_loading.WeightConverter
    first: str
    sources: tuple[tuple[str, str], ...]


class ModelWeights:
    """A checkpoint as a source under the model's own names; checked against the model's shapes when made.

    partly: weights may be missing, and are listed in `missing`: a checkpoint of one head need not have another's.
    untied: weights that the config ties to others, and of which the checkpoint holds other values: they are their own.
    turned: weights that the model has as [inputs, outputs], and that formats of quantized ones store as [outputs,
    inputs], as of any linear layer.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: WeightSource, partly: bool = False) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._plain: dict[str, str] = {}
        self._converted: dict[str, _Converted] = {}
        self._expected = _expected_shapes(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._last: tuple[_Converted, dict[str, Array]] | None = None
        self.notes: list[str] = []
        self.missing: list[str] = []
        self.untied: frozenset[str] = frozenset()
        unexpected = self._match()
        self.turned = self._turned()
        self._check(unexpected, partly)

    @property
    def names(self) -> Iterable[str]:
        return [*self._plain, *self._converted]

    def dtype(self, name: str) -> str:
        if name in self.missing:
            return "f32"
        if name in self._plain:
            return self._checkpoint.dtype(self._plain[name])
        return self._dtype_of(self._converted[name])

    def _dtype_of(self, group: _Converted) -> str:
        """The dtype of what is made from several tensors; f32, which loses nothing, where they have several."""
        dtypes = {self._checkpoint.dtype(source) for source, _ in group.sources}
        return dtypes.pop() if len(dtypes) == 1 else "f32"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._expected[name]

    def load(self, name: str) -> Array:
        value = self._load(name)
        if value.shape != self._expected[name]:  # of what is made of several tensors it is known only now
            raise FrontendError(
                f"the checkpoint does not fit the model. weight {name}, made from several tensors, is "
                f"{list(value.shape)}, the config wants {list(self._expected[name])}"
            )
        # Masks that a checkpoint stores may hold infinities; its weights may not.
        if name in self._parameters and not is_finite(value):
            raise FrontendError(
                f"weight {name} holds NaN or infinity: the checkpoint is damaged or was never whole; download it again"
            )
        return value

    def integers(self, name: str) -> StoredIntegers | None:
        """What a weight is stored as, if that is integers; of the transpose of one that is in `turned`."""
        return stored_integers(self._checkpoint, self._plain[name]) if name in self._plain else None

    def tensor_of(self, name: str) -> str | None:
        """The tensor of the checkpoint that a weight is, as it is stored; None where it is made of several."""
        return self._plain.get(name)

    @property
    def merged_integers(self) -> int:
        """How many tensors are stored as integers, and become part of another weight, as floats."""
        groups = {id(group): group for group in self._converted.values()}
        sources = [source for group in groups.values() for source, _ in group.sources]
        return sum(stored_integers(self._checkpoint, source) is not None for source in sources)

    def _load(self, name: str) -> Array:
        if name in self._plain:
            array = self._checkpoint.load(self._plain[name])
            return array.T if name in self.turned else array
        group = self._converted[name]
        if self._last is None or self._last[0] is not group:
            # A converter makes several weights at once; those that follow are usually asked for next.
            self._last = (group, self._convert(group))
        return self._last[1][name]

    def _match(self) -> set[str]:
        """Decide where every weight comes from; returns the tensors that belong nowhere."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self._model.base_model_prefix
        meta = self._model.state_dict()
        groups: dict[str, list[tuple[str, str]]] = {}
        unexpected = set()
        for tensor in sorted(self._checkpoint.names, key=dot_natural_key):
            target, pattern = rename_source_key(tensor, renamings, converters, prefix, meta)
            if target not in meta and tensor in meta:
                target, pattern = rename_source_key(tensor, [], [], prefix, meta)
            if target not in meta:
                unexpected.add(tensor)
            elif pattern is not None:
                groups.setdefault(target, []).append((tensor, pattern))
            elif target in self._plain:
                raise FrontendError(f"tensors {self._plain[target]!r} and {tensor!r} both mean weight {target}")
            else:
                self._plain[target] = tensor
        for first, sources in groups.items():
            group = _Converted(by_pattern[sources[0][1]], first, tuple(sources))
            for name in self._targets(group):
                self._converted[name] = group
        return unexpected

    def _turned(self) -> frozenset[str]:
        from transformers.pytorch_utils import Conv1D

        modules = {f"{path}.weight" for path, module in self._model.named_modules() if isinstance(module, Conv1D)}
        turned = set(getattr(self._checkpoint, "of_linears", ()))
        return frozenset(name for name in modules if self._plain.get(name) in turned)

    def _targets(self, group: _Converted) -> list[str]:
        """The weights that a converter makes: its first target's name with each of its target patterns in place."""
        patterns = group.converter.target_patterns
        if len(patterns) == 1:
            return [group.first]
        used = next((pattern for pattern in patterns if pattern in group.first), None)
        if used is None:
            return list(self._convert(group))
        names = [group.first.replace(used, pattern, 1) for pattern in patterns]
        return names if all(name in self._expected for name in names) else list(self._convert(group))

    def _convert(self, group: _Converted) -> dict[str, Array]:
        converter = copy.deepcopy(group.converter)
        for tensor, pattern in group.sources:
            converter.add_tensor(group.first, tensor, pattern, _lazily(self._checkpoint, tensor))
        try:
            with quiet():
                made = converter.convert(group.first, model=self._model, config=self._model.config)
        except Exception as error:  # operations raise many kinds
            raise FrontendError(
                f"weight {group.first} cannot be made from {shortened(name for name, _ in group.sources)}: "
                f"{' '.join(str(error).split())[:200]}"
            ) from error
        single = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        arrays = {name: to_numpy(value) for name, value in single.items()}
        return {name: array.astype(NUMPY_DTYPES[self._dtype_of(group)], copy=False) for name, array in arrays.items()}

    def _check(self, unexpected: set[str], partly: bool) -> None:
        """Every weight present in its shape (or noted, if `partly`), nothing left over; else one FrontendError."""
        self._tie()
        present = {*self._plain, *self._converted}
        missing = [name for name in self._expected if name not in present]
        missing = [name for name in missing if not _matches(name, self._model._keys_to_ignore_on_load_missing)]
        ignored = [*(self._model._keys_to_ignore_on_load_unexpected or ()), STORED_CONSTANTS.pattern]
        left_over = [name for name in unexpected if not self._harmless(name, ignored)]
        # A tensor of a module that this model does not have (a vision tower, a draft head) changes nothing here; one
        # of a module that it has would change what that module computes, so the config must be wrong.
        foreign = [name for name in left_over if not self._has_module(name)]
        left_over = [name for name in left_over if name not in foreign]
        wrong = []
        for name, tensor in self._plain.items():
            shape = self._checkpoint.shape(tensor)
            shape = shape[::-1] if name in self.turned else shape
            if name in self._expected and shape != self._expected[name]:
                wrong.append(f"{name} is {list(shape)}, the config wants {list(self._expected[name])}")
            if name in self._parameters and self._checkpoint.dtype(tensor) not in FLOATS:
                wrong.append(f"{name} holds {self._checkpoint.dtype(tensor)}, not floats")
        for name, group in self._converted.items():
            if name in self._parameters and (dtype := self._dtype_of(group)) not in FLOATS:
                wrong.append(f"{name} is made from {dtype}, not floats")
        if adapted := [name for name in (*left_over, *foreign) if _ADAPTED.search(name)]:
            raise FrontendError(f"the checkpoint holds tensors of an adapter, {shortened(adapted, 2)}: {MERGE}")
        if foreign:
            self.notes.append(f"tensors of parts that this model does not have are left out: {shortened(foreign)}")
        faults = []
        if partly:
            self.missing = missing
        elif missing:
            faults.append(f"missing: {shortened(missing)}")
        if wrong:
            faults.append(f"not as expected: {shortened(wrong)}")
        if left_over:
            faults.append(f"unexpected: {shortened(left_over)}")
        if faults:
            raise FrontendError(f"the checkpoint does not fit the model. {'; '.join(faults)}")

    def _tie(self) -> None:
        """Give tied weights what the checkpoint has of them: one tensor for all, or several, which may differ.

        Where they differ the config is wrong about them, and transformers believes the checkpoint; so do we.
        """
        untied = set()
        for name, same in _aliases(self._model).items():
            stored = [other for other in same if other in self._plain]
            if name in self._converted or not stored:
                continue
            if name not in self._plain:
                self._plain[name] = self._plain[stored[0]]
            elif name != stored[0] and not self._equal(self._plain[name], self._plain[stored[0]]):
                untied.add(name)
        self.untied = frozenset(untied)
        if untied:
            self.notes.append(
                f"config.json ties {shortened(untied)} to another weight, but the checkpoint holds both, and they "
                "differ: each is used as it is stored"
            )

    def _equal(self, one: str, other: str) -> bool:
        """Whether two tensors of the checkpoint hold the same numbers."""
        if one == other or self._checkpoint.shape(one) != self._checkpoint.shape(other):
            return one == other
        a, b = (self._checkpoint.load(name).reshape(-1) for name in (one, other))
        block = 1 << 20  # at a time: tables may have gigabytes
        return all(
            np.array_equal(a[start : start + block].astype(np.float32), b[start : start + block].astype(np.float32))
            for start in range(0, len(a), block)
        )

    def _has_module(self, tensor: str) -> bool:
        """Whether the module that a tensor's name belongs to is one of the model's, with or without its prefix, or a
        part of one that has no parts in the model (of a linear layer, say)."""
        modules = {name: any(True for _ in module.children()) for name, module in self._model.named_modules()}
        module = tensor
        for above in range(tensor.count(".")):
            module = module.rpartition(".")[0]
            for name in (module, f"{self._model.base_model_prefix}.{module}"):
                if name in modules and not (above and (modules[name] or _is_list(self._model, name))):
                    return True
        return False

    def _harmless(self, name: str, patterns: list[str]) -> bool:
        """Left-over tensors that say nothing: constants that older versions stored."""
        if _matches(name, patterns):
            return True
        weight = f"{name.removesuffix('.bias')}.weight"
        if name.endswith(".bias") and stored_integers(self._checkpoint, weight) is not None:
            return not self._checkpoint.load(name).any()  # some tools store one for every layer that they quantize
        shape = self._checkpoint.shape(name)
        if not name.endswith(".bias") or len(shape) not in (2, 4):
            return False
        # Stored causal masks, of four axes, unlike any bias, or of two.
        return len(shape) == 4 or np.array_equal(self._checkpoint.load(name), np.tri(*shape, dtype=np.bool_))


def _is_list(model: PreTrainedModel, name: str) -> bool:
    """Whether a module is a list of others, which may have none in this model."""
    from torch.nn import ModuleDict, ModuleList

    return isinstance(model.get_submodule(name), (ModuleList, ModuleDict))


def _lazily(checkpoint: WeightSource, tensor: str) -> Any:
    return lambda: to_torch(checkpoint.load(tensor))


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _expected_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _aliases(model: PreTrainedModel) -> Mapping[str, list[str]]:
    """For each weight that stands under several names, all of them."""
    names: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(value), []).append(name)
    found = {name: same for same in names.values() if len(same) > 1 for name in same}
    with contextlib.suppress(AttributeError):
        for name, other in model.all_tied_weights_keys.items():
            found.setdefault(name, [name, other])
    return found
