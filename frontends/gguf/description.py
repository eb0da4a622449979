"""What a GGUF file says about its model, as the architectures ask for it; and what they make of it.

Metadata has the numbers of a config under llama.cpp's names; whether there are biases, norms or an output matrix of its
own, the tensors show. An architecture is a function from a `Description` to a `Plan`.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmc.errors import FrontendError
from llmc.frontends.gguf.settings import Settings
from llmc.frontends.gguf.weights import Rows, Tensors, Values, Weight

Config = dict[str, object]
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# Where llama.cpp's files have no limit of their own to positions, there is none here.
_FAR = 1 << 24
_MOST_HEADS = 8192


@dataclass(frozen=True)
class Plan:
    """config: the settings of the transformers model (`model_type` among them). weights: where its weights come from.

    notes: for the user to read. pooling: of an encoder, how its tokens become one vector (llama.cpp's number)."""

    config: Config
    weights: dict[str, Weight]
    notes: tuple[str, ...] = ()
    pooling: int | None = None


Architecture = Callable[["Description"], Plan]
_ARCHITECTURES: dict[str, Architecture] = {}


def architecture(*names: str) -> Callable[[Architecture], Architecture]:
    """Registers the function of architectures, by what `general.architecture` calls them."""

    def register(function: Architecture) -> Architecture:
        for name in names:
            assert name not in _ARCHITECTURES
            _ARCHITECTURES[name] = function
        return function

    return register


def architectures() -> dict[str, Architecture]:
    """All that are known, by name: files of `architectures/` are found by themselves."""
    from llmc.frontends.gguf import architectures as room

    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
    return _ARCHITECTURES


@dataclass
class Description:
    """A file's settings and tensors. read: tensors that became settings."""

    path: Path
    name: str
    settings: Settings
    tensors: Tensors
    read: set[str] = field(default_factory=set)

    @property
    def layers(self) -> int:
        """Without those that draft tokens, which a model does not need."""
        return self.settings.integer("block_count") - self.drafts

    @property
    def drafts(self) -> int:
        return self.settings.integer("nextn_predict_layers", 0)

    @property
    def hidden(self) -> int:
        return self.settings.integer("embedding_length")

    @property
    def heads(self) -> int:
        return self._heads("attention.head_count")

    @property
    def kv_heads(self) -> int:
        return self._heads("attention.head_count_kv", self.heads)

    def _heads(self, name: str, default: int | None = None) -> int:
        found = self.settings.integer(name, default)
        if not 1 <= found <= _MOST_HEADS:
            raise self.settings.error(name, f"is {found}, outside 1..{_MOST_HEADS}")
        return found

    @property
    def head_dim(self) -> int:
        """Of keys and values alike."""
        found = self.settings.integer("attention.key_length", self.hidden // self.heads)
        if self.settings.integer("attention.value_length", found) != found:
            raise self.settings.error("attention.value_length", f"is not key_length, {found}, which is not supported")
        return found

    @property
    def rotary(self) -> int:
        """Channels of a head that are rotated."""
        return self.settings.integer("rope.dimension_count", self.head_dim)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix too: then the file has no other."""
        return "output.weight" not in self.tensors

    def in_layers(self, module: str) -> bool:
        """Whether some layer has this tensor, such as `attn_q.bias`."""
        return any(f"blk.{layer}.{module}" in self.tensors for layer in range(self.layers))

    def decoder(self, **more: object) -> Config:
        """The settings that most decoders have, by the names that most transformers configs have for them.

        more: settings of the architecture, which win; the epsilon of LayerNorms, whose config name differs, among them.
        """
        settings = self.settings
        embedding = self._tensor("token_embd.weight")
        if embedding.shape[-1] != self.hidden:
            raise settings.error("embedding_length", f"is {self.hidden}, but the embedding has {embedding.shape[-1]}")
        config: Config = {
            "vocab_size": embedding.shape[0],
            "max_position_embeddings": settings.integer("context_length"),
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": settings.integer("feed_forward_length"),
            "num_attention_heads": self.heads,
            "num_key_value_heads": more.get("num_key_value_heads") or self.kv_heads,
            "head_dim": more.get("head_dim") or self.head_dim,
            "tie_word_embeddings": self.tied,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),  # of the vocabulary, not the graph
        }
        self.common()
        if settings.has("attention.layer_norm_rms_epsilon") or not settings.has("attention.layer_norm_epsilon"):
            config["rms_norm_eps"] = settings.number("attention.layer_norm_rms_epsilon")
        return config | more

    def common(self) -> None:
        """What every decoder's file may say, and has to mean."""
        self.settings.ignore("vocab_size")  # as many as the embedding has rows
        self.settings.expect("attention.causal", (True,))
        self.settings.expect("pooling_type", (0,), "it is a model of embeddings")

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.rows("token_embd.weight")

    def rows(self, name: str) -> int:
        """Rows of a matrix that the model has to have."""
        return self._tensor(name).shape[0]

    def sliding(self, pattern: int) -> list[str]:
        """transformers' `layer_types` where the last of every `pattern` layers sees everything; the file may say which
        layers slide itself, by a number of that kind or one by one."""
        said = self.settings.get("attention.sliding_window_pattern")
        if isinstance(said, list):
            slides = self.settings.flags("attention.sliding_window_pattern") or []
            if len(slides) < self.layers:
                raise self.settings.error("attention.sliding_window_pattern", f"has {len(slides)} entries")
        else:
            every = self.settings.integer("attention.sliding_window_pattern", pattern)
            slides = [every < 1 or (layer + 1) % every != 0 for layer in range(self.layers)]
        return ["sliding_attention" if slide else "full_attention" for slide in slides[: self.layers]]

    def _tensor(self, name: str) -> _Shaped:
        if name not in self.tensors:
            raise FrontendError(f"{self.path}: it has no tensor {name!r}: it is no whole model")
        shape = self.tensors[name].shape
        if len(shape) != 2:
            raise FrontendError(f"{self.path}: tensor {name!r} is {list(shape)}, no matrix")
        return _Shaped((shape[0], shape[1]))

    def rope(self, *, base: float = 10000.0, partial: bool = False, latent: bool = False) -> Config:
        """transformers' `rope_parameters`. base: where the file names none. partial: whether a part of a head's
        channels may be rotated, as `rope.dimension_count` says. latent: whether keys are latent, with a rotated part of
        their own beside them, whose scaling has a factor for attention of its own."""
        settings = self.settings
        found: Config = {"rope_type": "default", "rope_theta": settings.number("rope.freq_base", base)}
        if not latent and (not 1 <= self.rotary <= self.head_dim or self.rotary % 2):
            most = f"an even number of up to {self.head_dim} channels of a head"
            raise settings.error("rope.dimension_count", f"is {self.rotary}, not {most}")
        if partial:
            part = self.rotary / self.head_dim
            # transformers multiplies again, and cuts off: 88 * (30 / 88) is 29.999...
            whole = int(self.head_dim * part) == self.rotary
            found["partial_rotary_factor"] = part if whole else math.nextafter(part, 2)
        elif not latent and self.rotary != self.head_dim:
            raise settings.error("rope.dimension_count", f"is {self.rotary} of {self.head_dim} channels of a head")
        return found | self._scaling(latent)

    def _scaling(self, latent: bool) -> Config:
        """What changes rotary frequencies, and how far attention is turned up for that."""
        settings = self.settings
        settings.ignore("rope.scaling.finetuned")
        # rope.scale_linear is its name in 2023. As in llama.cpp, 0 is no factor, and one without a type is linear.
        factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0)) or 1.0
        kind = settings.text("rope.scaling.type", "linear")
        if kind == "longrope" and factor != 1.0:
            raise settings.error("rope.scaling.factor", f"is {factor:g} with longrope, which is not supported")
        original = settings.integer("rope.scaling.original_context_length", 0)
        attention = settings.number("rope.scaling.attn_factor", 1.0)
        if factor < 0:
            raise settings.error("rope.scaling.factor", f"is {factor:g}, below 0")
        if kind == "yarn" and factor != 1.0:
            return self._yarn(factor, original, attention, latent)
        if "rope_freqs.weight" in self.tensors and kind in ("none", "linear"):
            factors = self._factors("rope_freqs.weight")
            if factor != 1.0 and kind == "linear":
                raise settings.error("rope.scaling.type", "is linear beside a table of factors, which is not supported")
            return {} if np.all(factors == 1.0) else _longrope(factors, factors, _FAR, 1.0)
        if "rope_factors_long.weight" in self.tensors:
            long, short = self._factors("rope_factors_long.weight"), self._factors("rope_factors_short.weight")
            return _longrope(short, long, original or settings.integer("context_length"), attention)
        if attention != 1.0:
            raise settings.error("rope.scaling.attn_factor", f"is {attention:g}, which is not supported")
        if kind in ("none", "longrope") or factor == 1.0:
            return {}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        raise settings.error("rope.scaling.type", f"is {kind!r:.40}, which is not supported")

    def _factors(self, name: str) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """A table of factors that frequencies are divided by [pairs]."""
        if name not in self.tensors:
            raise FrontendError(f"{self.path}: it has rope factors of one length, and no {name!r}")
        self.read.add(name)
        found = self.tensors.load(name).astype(np.float32).reshape(-1)
        if len(found) != self.rotary // 2 or not np.all(np.isfinite(found)) or not np.all(found > 0):
            raise FrontendError(
                f"{self.path}: {name} must have {self.rotary // 2} positive numbers, and has {len(found)}"
            )
        return found

    def _yarn(self, factor: float, original: int, attention: float, latent: bool) -> Config:
        settings = self.settings
        settings.expect("rope.scaling.yarn_ext_factor", (1.0, -1.0))
        # Converters have written it with two meanings: of the whole factor, and of one more.
        settings.expect("rope.scaling.yarn_attn_factor", (1.0,))
        turned_up: Config = {"attention_factor": 0.1 * math.log(factor) + 1.0}
        if latent:  # a tenth of what transformers has for the rotated and for all channels, which are the same here
            mscale = round(10 * settings.number("rope.scaling.yarn_log_multiplier"), 6)
            turned_up = {"mscale": mscale, "mscale_all_dim": mscale}
        settings.expect("rope.scaling.yarn_log_multiplier", (0.0,) if not latent else (mscale / 10,))
        if attention != 1.0:
            raise settings.error("rope.scaling.attn_factor", f"is {attention:g} with YaRN, which is not supported")
        if not original:
            raise settings.error("rope.scaling.original_context_length", "is missing, which YaRN needs")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": settings.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": settings.number("rope.scaling.yarn_beta_slow", 1.0),
        } | turned_up

    def weights(
        self,
        outside: Mapping[str, str],
        inside: Mapping[str, str],
        *,
        layers: str = "model.layers",
        rows: Mapping[str, Rows] | None = None,
        values: Mapping[str, Values] | None = None,
    ) -> dict[str, Weight]:
        """The weights of modules that are tensors of the file, where it has them.

        outside, inside (a layer): the model's name of a module to the file's, for its weight and bias; with a suffix,
        of one tensor; with several names after spaces, of all of them (`rows` then puts them together). rows, values:
        by the file's name of the (first) module, values also by that of its weight alone (`attn_norm.weight`).
        """
        found: dict[str, Weight] = {}

        def add(ours: str, theirs: str, place: str) -> None:
            names = theirs.split()
            suffixes = [""] if names[0].endswith((".weight", ".bias")) else [".weight", ".bias"]
            first = names[0].partition(".")[0]
            for suffix in suffixes:
                tensors = tuple(f"{place}{name}{suffix}" for name in names)
                if all(tensor in self.tensors for tensor in tensors):
                    whole = tensors[0].removeprefix(place)
                    changed = (values or {}).get(whole, (values or {}).get(first))
                    found[f"{ours}{suffix}"] = Weight(tensors, (rows or {}).get(first), changed)

        for ours, theirs in outside.items():
            add(ours, theirs, "")
        for layer in range(self.layers):
            for ours, theirs in inside.items():
                add(f"{layers}.{layer}.{ours}", theirs, f"blk.{layer}.")
        return found

    def left_over(self, weights: Mapping[str, Weight]) -> list[str]:
        """Tensors that nothing has used."""
        used = {tensor for weight in weights.values() for tensor in weight.tensors} | self.read
        drafts = tuple(f"blk.{self.layers + draft}." for draft in range(self.drafts))
        return [name for name in self.tensors.names if name not in used and not name.startswith(drafts)]


@dataclass(frozen=True)
class _Shaped:
    shape: tuple[int, int]


def _longrope(
    short: np.ndarray[tuple[int], np.dtype[np.float32]],
    long: np.ndarray[tuple[int], np.dtype[np.float32]],
    original: int,
    attention: float,
) -> Config:
    """Frequencies divided by tables: `short` up to `original` tokens, `long` beyond."""
    return {
        "rope_type": "longrope",
        "short_factor": short.tolist(),
        "long_factor": long.tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }
