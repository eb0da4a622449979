"""Options that several commands share, and their meaning as `CompileOptions`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmc.errors import CompileError

if TYPE_CHECKING:
    from llmc.compiler.options import CompileOptions

_COMPILING = "Compiling"
_SAMPLING = "Sampling"
_TEMPLATE = "Chat template"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model's directory, its .gguf or .onnx file, or its name on the Hugging Face hub."
    ),
]
Artifact = Annotated[Path, typer.Argument(metavar="SO", help="A compiled model.")]
ModelOrArtifact = Annotated[
    str,
    typer.Argument(metavar="MODEL_OR_SO", help="A compiled model, or a model that is compiled into the cache first."),
]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads at most; default: see `llmc doctor`.")]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="The weights' file, for a model compiled with --weights FILE.")
]
Verify = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Check every byte before the first step, or no weights at all; default: beside the first steps, once for "
        "each file.",
        show_default=False,
    ),
]

Target = Annotated[
    str, typer.Option("--target", "-t", help="The machine to compile for; `llmc doctor` lists them.",
                      rich_help_panel=_COMPILING),
]  # fmt: skip
Quantization = Annotated[
    str, typer.Option("--quantization", "-q", metavar="none|bf16|f16|int8|...|int2", rich_help_panel=_COMPILING,
                      help="How linear weights are stored; default: int4, and where `llmc compile` gets an encoder, "
                           "the fewest bits that keep the mean cosine of its vectors with the original's above 0.99."),
]  # fmt: skip


def group_size(text: str | int) -> int:
    """A group size as the command line has it; 0: `channel`."""
    try:
        if str(text) == "channel":
            return 0
        if int(text):
            return int(text)
        raise ValueError
    except ValueError:
        raise CompileError(f"--group-size is a number or channel, not {text!r:.40}") from None


GroupSize = Annotated[
    int, typer.Option("--group-size", metavar="16|32|64|128|256|channel", parser=group_size,
                      help="Weights that share a scale.", rich_help_panel=_COMPILING),
]  # fmt: skip
Symmetric = Annotated[
    bool, typer.Option("--symmetric/--asymmetric", rich_help_panel=_COMPILING,
                       help="int4 and less as levels of a table, or in even steps above a minimum in each group."),
]  # fmt: skip
Activations = Annotated[
    str | None, typer.Option("--activations", metavar="int8|bf16|f32", rich_help_panel=_COMPILING,
                             help="Lowest precision of layers' inputs; default: int8 for int2 to int8; bf16 for bf16."),
]  # fmt: skip
Embedding = Annotated[
    str | None, typer.Option("--embedding", metavar="SCHEME", rich_help_panel=_COMPILING,
                             help="The token embedding's own scheme; default: int6 where -q is int5 or less."),
]  # fmt: skip
Head = Annotated[
    str | None, typer.Option("--head", metavar="SCHEME", rich_help_panel=_COMPILING,
                             help="The output head's own scheme; default: int6 where -q is int5 or less."),
]  # fmt: skip
Overrides = Annotated[
    list[str] | None, typer.Option("--override", metavar="PATTERN=SCHEME", rich_help_panel=_COMPILING,
                                   help="A scheme for the weights whose name matches; can be given several times."),
]  # fmt: skip
Calibrate = Annotated[
    str | None, typer.Option("--calibrate", metavar="none|self|FILE", rich_help_panel=_COMPILING, show_default=False,
                             help="What weights are rounded by: nothing, the model's own text, a text file besides; "
                             "default with int6 and less: self."),
]  # fmt: skip
BitsPerWeight = Annotated[
    float | None, typer.Option("--bits-per-weight", metavar="BITS", rich_help_panel=_COMPILING, show_default=False,
                               help="With int6 and less: bits a weight, all in all; each gets what it is worth "
                               "[default: 0.1 more than the schemes take]."),
]  # fmt: skip
Lora = Annotated[
    list[str] | None, typer.Option("--lora", metavar="DIR", rich_help_panel=_COMPILING, show_default=False,
                                   help="An adapter as PEFT writes it, merged into the weights; several times: all."),
]  # fmt: skip
Adapters = Annotated[
    int, typer.Option("--adapters", metavar="N", rich_help_panel=_COMPILING,
                      help="Room for N adapters (LoRA) that are loaded at run time, one for each text."),
]  # fmt: skip
AdapterRank = Annotated[
    int, typer.Option("--adapter-rank", metavar="R", rich_help_panel=_COMPILING,
                      help="The greatest rank of such an adapter; ranks that are not used take no memory."),
]  # fmt: skip
LoadLora = Annotated[
    str | None, typer.Option("--lora", metavar="NAME=DIR", rich_help_panel=_SAMPLING, show_default=False,
                             help="Write with this adapter (LoRA), a directory of PEFT; the artifact needs room for it "
                             "(llmc compile --adapters N)."),
]  # fmt: skip
Fast = Annotated[
    bool, typer.Option("--fast", help="Compile sooner, less accurately: --calibrate none.",
                       rich_help_panel=_COMPILING),
]  # fmt: skip
Accuracy = Annotated[
    bool | None,
    typer.Option("--accuracy/--no-accuracy", rich_help_panel=_COMPILING, show_default=False,
                 help="Measure how far the result is from the original, for `llmc inspect --accuracy`; default: where "
                      "weights become integers, and with --fast and int8 only of models below 134M parameters."),
]  # fmt: skip
MaxContext = Annotated[
    int | None, typer.Option("--max-context", help="The most tokens a text may have; default: what the model says.",
                             rich_help_panel=_COMPILING),
]  # fmt: skip
MaxStep = Annotated[
    int | None,
    typer.Option(
        "--max-step",
        help="The most tokens of one step; more are split. Default: 512, encoders 2,048.",
        rich_help_panel=_COMPILING,
    ),
]

Tokenizer = Annotated[
    Path | None, typer.Option("--tokenizer", metavar="DIR", rich_help_panel=_COMPILING,
                              help="The folder of an .onnx model's tokenizer; default: beside the model."),
]  # fmt: skip
MaxDims = Annotated[
    list[str] | None, typer.Option("--max-dim", metavar="NAME=N", rich_help_panel=_COMPILING,
                                   help="The most of a size that a model of arrays names; can be given several times."),
]  # fmt: skip

Dims = Annotated[
    list[str] | None, typer.Option("--dim", metavar="NAME=N", rich_help_panel=_COMPILING,
                                   help="Make a size that such a model leaves free a number; several times."),
]  # fmt: skip

MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", help="Tokens to write at most.", rich_help_panel=_SAMPLING)
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", help="0 is greedy; default: the model's own.", rich_help_panel=_SAMPLING),
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Choose among the K likeliest tokens.", rich_help_panel=_SAMPLING)
]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Choose among the likeliest that make up P.", rich_help_panel=_SAMPLING)
]
MinP = Annotated[
    float | None, typer.Option("--min-p", help="Drop tokens less likely than P times the likeliest.",
                               rich_help_panel=_SAMPLING),
]  # fmt: skip
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", help="Above 1: avoid what was there before.",
                               rich_help_panel=_SAMPLING),
]  # fmt: skip
Seed = Annotated[
    int | None, typer.Option("--seed", help="The same seed gives the same text.", rich_help_panel=_SAMPLING)
]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", rich_help_panel=_SAMPLING,
                                   help="End before this text; can be given several times."),
]  # fmt: skip
MinNewTokens = Annotated[
    int | None, typer.Option("--min-new-tokens", help="Tokens to write at least.", rich_help_panel=_SAMPLING)
]
MaxTime = Annotated[
    float | None, typer.Option("--max-time", metavar="SECONDS", rich_help_panel=_SAMPLING,
                               help="End with the next token after so long."),
]  # fmt: skip
TypicalP = Annotated[
    float | None, typer.Option("--typical-p", rich_help_panel=_SAMPLING,
                               help="Choose among tokens of usual surprise that make up P."),
]  # fmt: skip
NoRepeatNgramSize = Annotated[
    int | None, typer.Option("--no-repeat-ngram-size", metavar="N", rich_help_panel=_SAMPLING,
                             help="No run of N tokens comes twice."),
]  # fmt: skip
SuppressTokens = Annotated[
    list[int] | None, typer.Option("--suppress-token", metavar="ID", rich_help_panel=_SAMPLING,
                                   help="Never write this token; can be given several times."),
]  # fmt: skip

Tools = Annotated[
    Path | None, typer.Option("--tools", metavar="FILE", rich_help_panel=_TEMPLATE,
                              help="JSON schemas of functions that the model may call, a list in a JSON file."),
]  # fmt: skip
Documents = Annotated[
    Path | None, typer.Option("--documents", metavar="FILE", rich_help_panel=_TEMPLATE,
                              help="Documents to answer from: a list of {title, text} in a JSON file."),
]  # fmt: skip
TemplateName = Annotated[
    str | None, typer.Option("--template", metavar="NAME", rich_help_panel=_TEMPLATE,
                             help="One of the model's chat templates, where it has several."),
]  # fmt: skip
TemplateVariables = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", rich_help_panel=_TEMPLATE,
                                   help="A variable of the chat template, such as enable_thinking=false: JSON, or "
                                        "else text; can be given several times."),
]  # fmt: skip


def compile_options(
    overrides: list[str] | None = None,
    max_dims: list[str] | None = None,
    dims: list[str] | None = None,
    **values: object,
) -> CompileOptions:
    """`CompileOptions` from what the command line gave."""
    from llmc.compiler.options import CompileOptions, parse_dims, parse_overrides

    parsed = {
        "overrides": parse_overrides(overrides or []),
        "max_dims": parse_dims(max_dims or [], "--max-dim"),
        "dims": parse_dims(dims or [], "--dim"),
    }
    return CompileOptions(**parsed, **values)  # type: ignore[arg-type]


def example(*lines: str) -> str:
    """The epilogue of a command's help."""
    return "**Example**\n\n" + "\n\n".join(f"`{text}`" for text in lines)
