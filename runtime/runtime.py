"""The front of the runtime: load an artifact, run steps, write text; embed and classify texts; run arrays."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Ids
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmc.files import OutputFile, write_all, writing
from llmc.runtime import cpu, topology
from llmc.runtime.arrays import ArrayRunner
from llmc.runtime.artifact import Artifact
from llmc.runtime.batch import ROWS, Rows, StepRunner
from llmc.runtime.chat_template import ChatTemplate, Message
from llmc.runtime.device import Code, Device, Place, Use
from llmc.runtime.devices import device_for
from llmc.runtime.encoding import Activation, Encoder, Texts, Told
from llmc.runtime.errors import RuntimeStateError, TextError
from llmc.runtime.fork_lock import STEPS, ForkLock
from llmc.runtime.generation import Options, TextStream, generate_batch, split_options
from llmc.runtime.kv_cache import CacheBuffers, PagePool
from llmc.runtime.layer import Layer
from llmc.runtime.limits import Limits
from llmc.runtime.load_options import check_options
from llmc.runtime.profile import KernelTime, kernel_times
from llmc.runtime.ragged import RaggedRunner
from llmc.runtime.sampling import Chooser
from llmc.runtime.sequence import Sequence
from llmc.runtime.settings import is_integer
from llmc.runtime.step_call import StepCaller
from llmc.runtime.tokenizer import Tokenizer
from llmc.runtime.weights import Weights, load_weights
from llmc.runtime.writing import Draft, write

if TYPE_CHECKING:
    from typing_extensions import Unpack

Prompt = str | Ids[int] | NDArray[np.integer]
Turn = Message | tuple[str, str]

_CONTEXTS_BY_DEFAULT = 16
# What an artifact is, by its task, and which method is for it.
_USES = {
    "generate": ("continues texts", "generate() or chat()"),
    "encode": ("is an encoder", "encode()"),
    "run": ("takes arrays", "run({name: array})"),
}
_MOST_SLOTS = 2**31 - 1  # slots are int32


class Runtime:
    """A loaded model. All methods may be called from several threads; steps take turns.

    With a cache, and in encoders, the bits of a row depend on the tokens of its own sequence alone: not on what else is
    in its steps, the number of threads, how its prompt was cut into steps, or what of it the cache held already. A
    token that decodes has the bits that it has in a prompt, too, but where `StepFacts.row_kinds` says that prompts
    are computed differently (machines with tile registers).
    """

    def __init__(self, artifact: Artifact, device: Device, code: Code, weights: Weights, kv_memory: int | None) -> None:
        """Use `Runtime.load`."""
        self.artifact = artifact
        self.device = device
        self.code = code
        self.manifest = artifact.manifest
        self.task = self.manifest.task
        self.threads = device.threads
        self.vocab_size = self.manifest.step.vocab_size
        self.max_context = self.manifest.max_context
        self.max_step = self.manifest.step.max_step
        self.page = self.manifest.step.page
        self.paged = self.manifest.step.state == "paged"
        self.row_kinds = self.manifest.step.row_kinds
        self.stop_ids = self.manifest.text.stop_ids if self.manifest.text else ()
        self.lock = ForkLock(STEPS)
        if not self.paged:
            self.max_context = min(self.max_context, self.max_step)  # every step sees the whole sequence
        self._weights = weights
        capacity = self._page_capacity(kv_memory) if self.paged else 0
        self.orphans: deque[int] = deque()  # places of sequences that were dropped
        self.buffers = CacheBuffers(device, self.manifest.layers if self.paged else (), capacity, self.page)
        self._tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None
        self._decoder: StepRunner | None = None
        self._encoder: Encoder | None = None
        self._arrays: ArrayRunner | None = None
        self._caller: StepCaller
        if self.task == "run":
            self._caller = self._arrays = ArrayRunner(artifact, device, weights.place)
        elif self.task == "encode":
            self._caller = runner = RaggedRunner(artifact, device, code, weights.place)
            own = weakref.proxy(self)  # no circle: a runtime that is dropped gives back what it has at once
            self._encoder = Encoder(artifact, runner, self.lock, lambda: own.tokenizer, self.vocab_size)
        else:
            self._caller = self._decoder = StepRunner(artifact, device, code, weights.place, self.buffers)
            self._pool = PagePool(self._decoder.layer)
            self.chooser = Chooser(device, code.choose_bytes(self.vocab_size), self.vocab_size)
        self._caller.source = weights

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        threads: int | None = None,
        verify: bool | None = None,
        kv_memory: int | None = None,
        weights: str | os.PathLike[str] | None = None,
        share_weights: bool | None = None,
    ) -> Runtime:
        """Loads an artifact.

        threads: at most so many for a step; by default one for each physical core of one NUMA node, which the pool's
        threads then keep to (`cpu.default_threads`). verify: True to check every byte now. By default large weights are
        checked beside the first steps: where they are damaged, the next step raises `ArtifactError`; a file that was
        found right is remembered, and not read again while it is unchanged. False: weights are never checked, nor the
        tokenizer before it is used (the rest always is, before any code runs). kv_memory: bytes for the KV cache, which
        grows up to that as it is used; by default as much as some whole contexts need, within half of the free memory.
        weights: the file with the weights of an artifact that was compiled without them. share_weights: True to use the
        mapped file, which processes share, False to copy it into huge pages now, which are read faster; by default it
        is copied where memory is plentiful, large ones beside the first steps. Raises `ArtifactError`.
        """
        check_options(path, threads, verify, kv_memory, weights, share_weights)
        cpus = None
        if threads is None:
            default = cpu.default_threads()
            threads, cpus = default.threads, default.cpus
        artifact = Artifact.open(Path(path))
        try:
            artifact.check_machine()
            artifact.check_library()
            if verify is not False:
                artifact.check_tokenizer()
            device = device_for(artifact, threads, cpus)
            code = device.open(artifact)
            external = None if weights is None else Path(weights)
            with topology.confined(cpus):  # memory is of the node where it is written first: that of who reads it
                data = load_weights(artifact, device, code, external, verify, share_weights)
            return cls(artifact, device, code, data, kv_memory)
        finally:
            artifact.close()

    @property
    def verified(self) -> bool:
        """Whether the weights are known to be what was written: checked by now, or before and unchanged since."""
        return self._weights.verified

    @property
    def verifying(self) -> bool:
        """Whether the weights are being checked at present."""
        return self._weights.verifying

    @property
    def is_loading(self) -> bool:
        """Whether anything is left of what `load` left for later."""
        return self._weights.pending

    def wait_verified(self) -> bool:
        """Waits until the weights are checked, if they are to be, and says whether they were. Raises `ArtifactError`
        where they are damaged: what steps gave before it is not to be relied on."""
        if not self.verified:
            self.finish_loading()
        return self.verified

    def finish_loading(self) -> None:
        """Waits for all that `load` left for later, so that steps are as fast as they will be. Raises `ArtifactError`
        where the weights are damaged."""
        while True:
            with self.lock:
                self._caller.settle()
            if not self._weights.pending:
                return
            self._weights.join()

    def close(self) -> None:
        """Ends what is left of loading, and gives the weights up: every later step is a `RuntimeStateError`. A runtime
        that is dropped does this by itself."""
        with self.lock:
            self._weights.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the loaded artifact to a file, all or nothing; a link to it stays one. Raises `ArtifactError`."""
        target = Path(path)
        with writing(target), OutputFile(target) as file:
            write_all(file.descriptor, self.artifact.view.data)

    def _page_capacity(self, kv_memory: int | None) -> int:
        per_page = max(1, self.manifest.bytes_per_page)
        context = -(-self.max_context // self.page)
        if kv_memory is None:
            affordable = max(0, cpu.available_memory() - self._weights.bytes_to_come) // 2 // per_page
            return min(max(context, min(_CONTEXTS_BY_DEFAULT * context, affordable)), _MOST_SLOTS // self.page)
        if kv_memory < per_page:
            raise RuntimeStateError(f"kv_memory of {kv_memory} bytes holds no page; a page has {per_page} bytes")
        return min(kv_memory // per_page, _MOST_SLOTS // self.page)

    # For checks of the artifact itself

    @property
    def caller(self) -> StepCaller:
        """What fills in steps and calls them."""
        return self._caller

    @property
    def layer(self) -> Layer:
        """The session layer, which has sequences and their pages. Hold `lock` while you call it."""
        return self._decodes("sequence()").layer

    @property
    def pool(self) -> PagePool:
        """The pages of the cache."""
        self._decodes("sequence()")
        return self._pool

    @property
    def weights(self) -> NDArray[np.uint8]:
        """The artifact's weights as steps find them at present; read only."""
        weights = self._weights
        return self.device.fetch(weights.place, (weights.nbytes,), np.uint8)  # type: ignore[return-value]

    # What the artifact is for

    def _wrong(self, method: str) -> RuntimeStateError:
        """The error of a method that is not for this kind of artifact."""
        what, use = _USES[self.task]
        if self._encoder is not None and self._encoder.facts is not None:
            kind = self._encoder.facts.kind
            use = {"embedding": "embed()", "classification": "classify()"}.get(kind, use)
        return RuntimeStateError(f"{self.artifact.path} {what}: use {use}, not {method}")

    def _decodes(self, method: str) -> StepRunner:
        if self._decoder is None:
            raise self._wrong(method)
        return self._decoder

    def _encodes(self, method: str) -> Encoder:
        if self._encoder is None:
            raise self._wrong(method)
        return self._encoder

    # Tokens

    def sequence(self, expected: int = 0, lora: str | None = None) -> Sequence:
        """A new empty sequence, computed with the adapter of this name, which has to be loaded; None: with none.

        expected: how many tokens it will have at least, where that is known. Models for long contexts may compute every
        token differently in a long sequence: this one is computed as such from the start, and not anew as it grows.
        """
        layer = self.layer
        if not is_integer(expected) or not 0 <= expected <= self.max_context:
            raise RuntimeStateError(f"expected is {expected!r:.40}: the context has {self.max_context} tokens")
        with self.lock:
            number = self._decodes("sequence()").adapters.number(lora)
            made = Sequence(self, layer.sequence(int(expected)))
            layer.adapt(made.place, number)
            return made

    # Adapters

    def load_lora(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Loads an adapter (LoRA) from a directory as PEFT writes it, in place of one of this name. Texts and sequences
        that are made with `lora=name` are computed with it from then on; the weights stay what they are.

        AdapterError, before anything has changed, for one that does not fit the artifact or is more than products that
        are added, where there is no room for another, and while an adapter of this name is in use.
        """
        adapters = self._decodes("load_lora()").adapters
        read = adapters.read(name, directory)
        with self.lock:
            self.collect_orphans()
            adapters.put(*read)

    def unload_lora(self, name: str) -> None:
        """Takes an adapter away, so that there is room for another. AdapterError while it is in use."""
        adapters = self._decodes("unload_lora()").adapters
        with self.lock:
            self.collect_orphans()
            adapters.take(name)

    @property
    def loras(self) -> dict[str, Path]:
        """The adapters that are loaded: directories by name."""
        return {} if self._decoder is None else self._decoder.adapters.loaded

    def collect_orphans(self) -> None:
        """Gives back the pages of sequences that were dropped without being closed."""
        with self.lock:
            while self.orphans:
                self.layer.end(self.orphans.popleft())

    def step(self, requests: Ids[tuple[Sequence, Ids[int] | NDArray[np.integer], Rows]]) -> NDArray[np.float32]:
        """Appends tokens to sequences, and returns the logits asked for, float32 [rows, vocab], in order.

        Each request is (sequence, ids, which of its rows: "all", "last" or "none"). Any mixture of long and short ones
        runs in as few steps of `max_step` tokens as it takes. On an error the sequences that were not yet served are
        as before. One token behind others that the sequence has run decodes, all else is a prompt: where `row_kinds` is
        true, do not cut a prompt so that one token is left; each change of kind takes another step.
        """
        checked = [self._check_request(request) for request in requests] if isinstance(requests, Iterable) else []
        total = sum(len(ids) if rows == "all" else int(rows == "last") for _, ids, rows in checked)
        with self.lock:
            place = self._step(checked, self._room(total))
        return self.fetch_logits(place, total)

    def _room(self, rows: int) -> Place:
        """New memory for logits."""
        return self.device.reserve(4 * rows * self.vocab_size, Use.RESULT).at()

    def fetch_logits(self, place: Place, rows: int = 1) -> NDArray[np.float32]:
        """The logits at a place that `step_last` or `decode` gave, float32 [rows, vocab]; see `Device.fetch`."""
        return self.device.fetch(place, (rows, self.vocab_size), np.float32)  # type: ignore[return-value]

    def step_last(self, requests: Ids[tuple[Sequence, NDArray[np.int32]]]) -> list[Place]:
        """`step` for the last rows. Returns where the logits of each lie, float32 [vocab]; the next step overwrites
        them: hold `lock` while you use them."""
        with self.lock:
            first = self._step([(sequence, self.check_ids(ids), "last") for sequence, ids in requests], None)
        return [first + 4 * index * self.vocab_size for index in range(len(requests))]

    def decode(self, sequences: list[Sequence], tokens: list[int]) -> list[Place]:
        """`step_last` of one token for each sequence. Hold `lock` while you use the logits."""
        return self.step_last([(one, np.array([token])) for one, token in zip(sequences, tokens, strict=True)])

    def write(
        self,
        sequences: list[Sequence],
        drafts: list[Draft],
        end_time: float | None = None,
        times: NDArray[np.int64] | None = None,
    ) -> BaseException | None:
        """Lets the artifact write on: each draft's last token is fed and the next one chosen, in turn; see
        `writing.write`. Returns the error of a step, which ended it."""
        runner = self._decodes("generate()")
        with self.lock:
            if self.orphans:
                self.collect_orphans()
            self._check_sequences(sequences)
            return write(runner, drafts, end_time, times)

    def _check_sequences(self, sequences: list[Sequence]) -> None:
        if not sequences:
            raise RuntimeStateError("a step needs at least one sequence")
        if len(sequences) > 1 and len(set(map(id, sequences))) != len(sequences):
            raise RuntimeStateError("a sequence may appear only once in a step")
        for sequence in sequences:
            if not isinstance(sequence, Sequence):
                raise RuntimeStateError(f"a step needs sequences that sequence() made, not {sequence!r:.40}")
            if sequence.runtime is not self:
                raise RuntimeStateError("this sequence belongs to another runtime")
            if sequence.closed:
                raise RuntimeStateError("this sequence is closed")

    def _step(self, requests: list[tuple[Sequence, NDArray[np.int32], Rows]], out: Place | None) -> Place:
        """Runs the requests, and returns where the logits are. out None: they may lie in the runner's buffer."""
        runner = self._decodes("step()")
        self.collect_orphans()
        self._check_sequences([sequence for sequence, _, _ in requests])
        return runner.feed(requests, out)

    def _check_request(self, request: object) -> tuple[Sequence, NDArray[np.int32], Rows]:
        """A request of `step`, its ids as an array."""
        if not isinstance(request, tuple | list) or len(request) != 3:
            raise RuntimeStateError(f"a step needs requests of (sequence, ids, rows), not {request!r:.40}")
        sequence, ids, rows = request
        if not isinstance(rows, str) or rows not in ROWS:
            raise RuntimeStateError(f"the rows of a request must be one of {', '.join(ROWS)}, not {rows!r:.40}")
        return sequence, self.check_ids(ids), rows

    def check_ids(self, ids: Ids[int] | NDArray[np.integer]) -> NDArray[np.int32]:
        """Token ids as int32 [tokens]; RuntimeStateError for what are none of the vocabulary."""
        try:
            array = np.asarray(ids)
        except ValueError:  # lists of unequal lengths
            array = np.zeros(())
        if array.ndim == 0:
            raise RuntimeStateError(f"token ids must be a list of integers, not {ids!r:.40}")
        if array.ndim != 1 or not len(array):
            raise RuntimeStateError(f"token ids must be a list of at least one id, not of shape {array.shape}")
        if array.dtype.kind not in "iu":
            raise RuntimeStateError(f"token ids must be integers, not {array.dtype}")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            bad = low if low < 0 else high
            raise RuntimeStateError(f"token id {bad} is not in the vocabulary of {self.vocab_size}")
        return np.ascontiguousarray(array, np.int32)

    def forward(self, token_ids: Ids[int] | NDArray[np.integer]) -> NDArray[np.float32]:
        """Logits after each token of a fresh sequence: float32 [len(token_ids), vocab]."""
        self._decodes("forward()")
        with self.sequence() as sequence:
            return self.step([(sequence, token_ids, "all")])

    # Text

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, read when first needed."""
        with self.lock:
            if self._tokenizer is None:
                data = self.artifact.tokenizer()
                if data is None or self.manifest.text is None:
                    use = "use forward() and sequence() with token ids"
                    if self._encoder is not None:
                        use = "give lists of token ids in place of texts, or compile it with `--tokenizer DIR`"
                    raise TextError(f"this artifact has no tokenizer: {use}")
                self._tokenizer = Tokenizer(data, self.manifest.text)
            return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template, read when first needed."""
        with self.lock:
            if self._chat_template is None:
                if self.manifest.text is None:
                    raise TextError("this artifact has no tokenizer: use forward() and sequence() with token ids")
                self._chat_template = ChatTemplate(self.manifest.text)
            return self._chat_template

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> TextStream:
        """The model's continuation of a prompt (text or token ids), piece by piece; see `Options`."""
        self._decodes("generate()")
        return TextStream(self, self._encode(prompt), options)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> str:
        """The model's continuation of a prompt (text or token ids); see `Options`."""
        return self.stream(prompt, **options).text()

    def generate_batch(self, prompts: Ids[Prompt], **options: Unpack[Options]) -> list[str]:
        """Continuations of several prompts at once: faster than one by one, as they share every step."""
        self._decodes("generate_batch()")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise RuntimeStateError(f"prompts must be a list of prompts, not {prompts!r:.40}")
        return generate_batch(self, [self._encode(prompt) for prompt in prompts], options)

    def stream_chat(self, messages: str | Ids[Message], **options: object) -> TextStream:
        """`chat`, piece by piece."""
        prompt, rest = self._chat_prompt(messages, options)
        return TextStream(self, prompt, rest)

    def chat(self, messages: str | Ids[Message], **options: object) -> str:
        """The assistant's next turn. messages: {"role", "content", ...} dicts, or one user message.

        options: those of `Options`; `tools`, `documents`, `chat_template`, `continue_final_message` and
        `add_generation_prompt` of `ChatTemplate.render`; and whatever else the model's chat template reads, such as
        `enable_thinking`.
        """
        return self.stream_chat(messages, **options).text()

    def chat_batch(self, conversations: Ids[str | Ids[Message]], **options: object) -> list[str]:
        """The assistant's next turns of several conversations at once; options as of `chat`."""
        prompts = [self._chat_prompt(messages, options) for messages in conversations]
        return generate_batch(self, [prompt for prompt, _ in prompts], prompts[0][1]) if prompts else []

    def response(self, query: str, history: Ids[Turn] | None = None, **options: object) -> str:
        """The answer to a user's query. history: earlier turns, as (query, answer) pairs or messages."""
        return self.stream_response(query, history, **options).text()

    def stream_response(self, query: str, history: Ids[Turn] | None = None, **options: object) -> TextStream:
        """`response`, piece by piece."""
        messages: list[Message] = []
        for turn in history or ():
            if isinstance(turn, tuple):
                messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            else:
                messages.append(turn)
        return self.stream_chat([*messages, {"role": "user", "content": query}], **options)

    def _chat_prompt(
        self, messages: str | Ids[Message], options: Mapping[str, object]
    ) -> tuple[NDArray[np.int32], Options]:
        """A conversation's token ids, and those options that are not the template's."""
        self._decodes("chat()")
        known, arguments = split_options(options)
        self.chat_template.check_variables(arguments)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        elif not isinstance(messages, Iterable):
            raise TextError(f"messages must be a text or a list of messages, not {messages!r:.60}")
        text = self.chat_template.render(list(messages), **arguments)  # type: ignore[arg-type]
        return self.check_ids(self.tokenizer.encode(text, add_special=False)), known

    def _encode(self, prompt: Prompt) -> NDArray[np.int32]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if not hasattr(ids, "__len__"):
            raise RuntimeStateError(f"the prompt must be a text or a list of token ids, not {prompt!r:.40}")
        if not len(ids):
            raise RuntimeStateError("the prompt is empty: give at least one token")
        return self.check_ids(ids)

    # Encoders

    def embed(
        self,
        texts: Texts,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        normalize: bool | None = None,
        progress: Told | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings of texts: float32 [texts, dimension], in order; [dimension] of a single text.

        texts: a text or a list of them; a text may also be a list of token ids, with the special ones. Texts longer
        than `max_tokens` lose their end. prompt: goes in front of every text; prompt_name: the same by a name that the
        model has; default: the model's own default. normalize: True for vectors of length 1; default: as the model
        has it. progress(done, all): called as texts are done. Any batch gives the same vectors as its texts alone.
        """
        return self._encodes("embed()").embed(texts, prompt, prompt_name, normalize, progress)

    def classify(
        self, texts: Texts, *, activation: Activation | None = None, progress: Told | None = None
    ) -> list[dict[str, object]] | dict[str, object]:
        """Classes of texts or of (text, text) pairs: {"label": the best, "score": its score, "scores": {label: score}}
        for each, in order; one of it for a single text or pair.

        activation: how scores become probabilities; default: "softmax", "sigmoid" where labels do not exclude each
        other, and "none" where there is only one.
        """
        return self._encodes("classify()").classify(texts, activation, progress)

    def tag(
        self, texts: Texts, *, progress: Told | None = None
    ) -> list[list[dict[str, object]]] | list[dict[str, object]]:
        """Labels of every token but the special ones: {"word", "label", "score", "start", "end"} (characters), a list
        for each text; only "label" and "score" where token ids are given."""
        return self._encodes("tag()").tag(texts, progress)

    def encode(
        self, texts: Texts, *, progress: Told | None = None
    ) -> list[dict[str, NDArray[np.generic]]] | dict[str, NDArray[np.generic]]:
        """All outputs of an encoder by name, such as `last_hidden_state` [tokens, features], for each text or pair."""
        return self._encodes("encode()").encode(texts, progress)

    @property
    def max_tokens(self) -> int:
        """Tokens of a text at most: an encoder cuts longer ones, a decoder refuses them."""
        return self.max_context if self._encoder is None else self._encoder.max_tokens

    @property
    def dimension(self) -> int:
        """Numbers of an embedding."""
        return self._encodes("embed()").dimension

    # Graphs of any kind

    def run(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.generic]]:
        """The outputs of a model that is not text, by name, from its inputs by name.

        Arrays must have the dtype and shape that the model wants; lists and numbers are converted. Sizes that the model
        names are read off the shapes. bfloat16 inputs are given as float32 and rounded, such outputs are float32.
        """
        if self._arrays is None:
            raise self._wrong("run()")
        with self.lock:
            return self._arrays.run(inputs)

    # Measuring

    def set_profiling(self, on: bool) -> None:
        """Whether steps add up the time of each kernel call, from zero."""
        with self.lock:
            self._caller.set_profiling(on)

    def profile(self) -> list[tuple[str, int]]:
        """(what, nanoseconds) of each kernel call of a step, summed since `set_profiling(True)`."""
        with self.lock:
            return list(zip(self.manifest.step.calls, self._caller.profile.tolist(), strict=True))

    def profiled_steps(self) -> int:
        """The steps that `profile` sums up."""
        with self.lock:
            return len(self._caller.profiled)

    def profile_kernels(self) -> list[KernelTime]:
        """`profile` for each step, the calls of one kernel for one op and shape together, with what they cost."""
        with self.lock:
            facts, runner = self.manifest.step, self._caller
            return kernel_times(facts.calls, [taken.tolist() for taken in runner.taken], facts.costs, runner.profiled)

    def measure_limits(self, memory_only: bool = False) -> Limits:
        """What this computer can do at most with as many threads: memory and multipliers; a third of a second each."""
        wanted = [fact for fact in self.manifest.step.limits if fact.name == "read" or not memory_only]
        with self.lock:
            return self.code.measure_limits(wanted, self.threads)
