"""A wrong command line, in one line that says where to look."""

from __future__ import annotations

import typer

# `typer.BadParameter` is public; the base of all errors about a command line is above it.
_USAGE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def is_usage_error(error: Exception) -> bool:
    """Whether the parser of the command line raised it."""
    return isinstance(error, _USAGE)


def usage_message(error: Exception) -> str:
    """What is wrong, and which --help says more."""
    message = str(getattr(error, "format_message", lambda: str(error))()).rstrip(".")
    context = getattr(error, "ctx", None)
    path = getattr(context, "command_path", None) or "llmc"
    return f"{message} (`{path} --help` says more)"
