"""The files beside an ONNX model: config, labels and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llmc.errors import FrontendError
from llmc.frontends.hf.config import read_json
from llmc.frontends.hf.generation import Generation, generation_of, read_generation, token_ids
from llmc.frontends.hf.sentence import Sentence, activation_of_scores
from llmc.frontends.hf.tokenizer import has_tokenizer, open_tokenizer, text_of
from llmc.frontends.lifted import Text

_MOST_POSITIONS = 1 << 28
# Optimum puts the model into a folder of its own below config.json.
_FOLDERS = ("onnx", "openvino", "model")


class Companions:
    """The files around one model. config: config.json, or nothing; tokenizer: the user's own choice of a folder."""

    def __init__(self, model: Path, tokenizer: str | Path | None = None) -> None:
        folders = [model.parent]
        if model.parent.resolve().name in _FOLDERS:
            folders.append(model.parent.parent)
        self.folders = tuple(folders)
        self._tokenizer = Path(tokenizer).expanduser() if tokenizer is not None else None
        if self._tokenizer is not None and not self._tokenizer.is_dir():
            raise FrontendError(
                f"there is no directory {self._tokenizer}: --tokenizer takes one that holds a tokenizer"
            )
        self.config: dict[str, object] = self._json("config.json")
        genai = self._json("genai_config.json")
        self._genai, self._search = _object(genai.get("model")), _object(genai.get("search"))

    def _json(self, name: str) -> dict[str, object]:
        for folder in self.folders:
            if (folder / name).exists():
                return read_json(folder / name)
        return {}

    def find(self, name: str) -> Path | None:
        """A file beside the model, or in the folder above where exporters put models into one of their own."""
        return next((folder / name for folder in self.folders if (folder / name).exists()), None)

    @property
    def architecture(self) -> str | None:
        """The model type that the config names."""
        found = self.config.get("model_type", self._genai.get("type"))
        return found if isinstance(found, str) and 0 < len(found) <= 64 else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the model was made of, such as BertForSequenceClassification."""
        found = self.config.get("architectures")
        return tuple(name for name in found if isinstance(name, str)) if isinstance(found, list) else ()

    @property
    def max_positions(self) -> int | None:
        """The model's own limit on positions, whatever it calls it."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
        values = (*map(self.config.get, names), self._genai.get("context_length"))
        return next((count for count in map(_count, values) if count is not None and count > 1), None)

    @property
    def layers(self) -> int | None:
        for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers"):
            value = _count(self.config.get(name))
            if value is not None:
                return value
        return None

    @property
    def labels(self) -> list[str] | None:
        """The names of a classifier's classes, by index."""
        found = self.config.get("id2label")
        if not isinstance(found, dict) or not found:
            return None
        labels = [found.get(str(index)) for index in range(len(found))]
        return [str(label) for label in labels] if all(isinstance(label, str) for label in labels) else None

    def activation_of_scores(self, width: int, sentence: Sentence | None) -> str:
        """What makes scores of `width` logits; see `hf.sentence`."""
        where = self.find("config.json") or self.folders[0]
        return activation_of_scores(self.config, width, where, sentence)

    @property
    def pad_id(self) -> int | None:
        value = self.config.get("pad_token_id")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def settings(self, vocab_size: int) -> Settings:
        """What readers of tokenizers ask of a config."""
        return Settings(vocab_size, self.config.get("eos_token_id", self._genai.get("eos_token_id")))

    def tokenizer_folder(self) -> Path:
        """The folder of --tokenizer, or the nearest one that holds a tokenizer; the model's own where none does."""
        if self._tokenizer is not None:
            return self._tokenizer
        return next((folder for folder in self.folders if has_tokenizer(folder)), self.folders[0])

    def require_tokenizer(self, text: Text) -> None:
        """FrontendError where the user named a folder and it holds no tokenizer."""
        if self._tokenizer is not None and text.facts is None:
            raise FrontendError(f"{self._tokenizer} holds no tokenizer: expected tokenizer.json or the like")

    def text(self, vocab_size: int) -> Text:
        """The tokenizer of a decoder."""
        folder, settings = self.tokenizer_folder(), self.settings(vocab_size)
        text = text_of(*open_tokenizer(folder), folder, settings, self._generation(settings))  # type: ignore[arg-type]
        self.require_tokenizer(text)
        return text

    def _generation(self, settings: Settings) -> Generation:
        """The model's settings of generation: beside it, as transformers or ONNX Runtime GenAI has them, or else beside
        its tokenizer."""
        beside = self.find("generation_config.json")
        if beside is None and self._search:
            found = generation_of(self._search, "genai_config.json", settings.vocab_size)
        else:
            folder = self.tokenizer_folder() if beside is None else beside.parent
            found = read_generation(folder, settings.vocab_size)
        return found if found.end_ids else replace(found, end_ids=token_ids(settings.eos_token_id))


class Settings:
    """What `read_text` asks of a transformers config."""

    def __init__(self, vocab_size: int, eos_token_id: object) -> None:
        self.vocab_size = vocab_size
        self.eos_token_id = eos_token_id

    def get_text_config(self, **choice: bool) -> Settings:
        return self


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    """A number of positions or layers that makes sense; None for anything else."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_POSITIONS
    return int(value) if good else None  # type: ignore[call-overload]


def model_name(path: Path) -> str:
    """A model's name: of its file, or of the folder where the file has a name that all models share."""
    generic = path.stem.split("_")[0] in ("model", "decoder", "encoder")
    folder = path.absolute().parent
    if folder.name in _FOLDERS:
        folder = folder.parent
    return folder.name if generic and folder.name else path.stem
