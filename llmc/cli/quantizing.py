"""quantize: a model as a quantized checkpoint, for other tools and for llmc."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from llmc.cli import options as o
from llmc.cli import output
from llmc.errors import CompileError


def quantize(
    model: o.Model,
    path: Annotated[Path, typer.Option("--output", "-o", help="The folder to write; it is not there yet.")],
    quantization: Annotated[
        str, typer.Option("--quantization", "-q", metavar="int4|int8|int2", help="Integers of linear layers.")
    ] = "int4",
    form: Annotated[
        str, typer.Option("--form", metavar="compressed-tensors|gptq", help="What other tools read it as.")
    ] = "compressed-tensors",
    group_size: Annotated[
        int,
        typer.Option(
            "--group-size", metavar="16|32|64|128|256|channel", parser=o.group_size, help="Weights that share a scale."
        ),
    ] = 128,
    calibrate: o.Calibrate = None,
    fast: Annotated[bool, typer.Option("--fast", help="Sooner, less accurately: --calibrate none.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Of the text that the model writes.")] = 0,
    json: o.Json = False,
) -> None:
    """Write a model as a quantized checkpoint that vLLM, transformers and others read.

    Weights are rounded by what layers see of text that the model itself writes, as `compile` does it, but in even
    steps. The head and the embedding stay as they are.
    """
    from llmc.api import quantize as write

    if fast and calibrate not in (None, "none"):
        raise CompileError(f"--fast is --calibrate none, and not --calibrate {calibrate}")
    started = time.perf_counter()
    with output.progress() as progress:
        chosen = "none" if fast else calibrate
        written = write(model, path, quantization, form, progress, group_size=group_size, calibrate=chosen, seed=seed)
    seconds = round(time.perf_counter() - started, 2)
    if json:
        output.print_json(
            {
                "path": str(path), "form": form, "layers": written.layers, "kept": list(map(list, written.kept)),
                "weight_bytes": written.file_bytes, "seconds": seconds,
            }
        )  # fmt: skip
        return
    print(f"{path}: {output.size(written.file_bytes)}, {written.layers} layers of {quantization}, in {seconds} s")
    for layer, why in written.kept:
        print(f"{layer} stays as it is: {why}")


COMMANDS = (
    (quantize, ("llmc quantize examples/pycoder -q int4 -o pycoder-int4", "llmc compile pycoder-int4 -o pycoder.so")),
)
