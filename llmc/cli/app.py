"""The list of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from llmc.cli import compiling, encoding, measuring, quantizing, reporting, verifying, writing
from llmc.cli.options import example

app = typer.Typer(
    name="llmc",
    help="Compile language models ahead of time, and run what was compiled.",
    epilog=example("llmc compile examples/pycoder -q int4 -o pycoder.so", "llmc run pycoder.so 'def fibonacci('"),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        import llmc

        print(f"llmc {llmc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback of an error (also: LLMC_DEBUG=1).")] = False,
) -> None:
    """Compile language models ahead of time, and run what was compiled."""


for group in (
    compiling.COMMANDS,
    quantizing.COMMANDS,
    writing.COMMANDS,
    encoding.COMMANDS,
    measuring.COMMANDS,
    reporting.COMMANDS,
    verifying.COMMANDS,
):
    for function, examples in group:
        app.command(epilog=example(*examples))(function)


def command() -> typer.core.TyperGroup:
    """The parser of all commands."""
    parser = typer.main.get_command(app)
    assert isinstance(parser, typer.core.TyperGroup)
    return parser
