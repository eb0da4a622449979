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
    context = getattr(error, "ctx", None)
    misplaced = _misplaced(error, context)
    if misplaced is not None:
        return misplaced
    message = str(getattr(error, "format_message", lambda: str(error))()).rstrip(".")
    path = getattr(context, "command_path", None) or "llmc"
    return f"{message} (`{path} --help` says more)"


def _misplaced(error: Exception, context: typer.Context | None) -> str | None:
    """What to say of an option that stands before the command it belongs to."""
    option = getattr(error, "option_name", None)
    commands = getattr(getattr(context, "command", None), "commands", {})
    if any(option in parameter.opts for command in commands.values() for parameter in command.params):
        return f"{option} stands behind the command: `llmc COMMAND ... {option}` (`llmc --help` lists the commands)"
    return None
