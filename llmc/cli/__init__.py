"""The command line: `llmc COMMAND ...`. Here are options and output; the work is done in other rooms."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from llmc.errors import LlmcError

__all__ = ["main", "run"]

# What a machine that only runs models does not have: the packages of llmc[compile], as they are imported.
COMPILING = frozenset({"ml_dtypes", "tvm", "torch", "transformers", "safetensors", "huggingface_hub"})
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


def main() -> None:
    """The console script."""
    from llmc.cli import streams

    streams.prepare()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status: 0; 1 after an error; 2 for a wrong command line.

    An error is one line on stderr. With --json there is exactly one object on stdout, after an error {"error": ...}. A
    traceback is shown only with `llmc --debug ...` or LLMC_DEBUG=1.
    """
    from llmc.cli import output

    before_dashes = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    as_json = "--json" in before_dashes and not {"--help", "-h"} & set(before_dashes)
    debug = "--debug" in before_dashes[:1] or os.environ.get("LLMC_DEBUG", "") not in ("", "0")
    with output.json_only() if as_json else nullcontext():
        return _run(list(arguments) or ["--help"], debug)


def _run(arguments: list[str], debug: bool) -> int:
    """One command, and every error as its message and status."""
    from llmc.cli import streams
    from llmc.cli.app import command
    from llmc.cli.usage import is_usage_error, usage_message

    try:
        result = command().main(args=arguments, prog_name="llmc", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            return _stopped()
        return result if isinstance(result, int) else 0
    except LlmcError as error:
        return _fail(str(error), 1, debug)
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        streams.silence(1)
        return 1
    except OSError as error:
        if isinstance(error, streams.ResultsError):
            streams.silence(1)
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1, debug)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in COMPILING:
            return _fail(f"compiling a model needs {error.name}: pip install 'llmc[compile]'", 1, debug)
        return _fail(f"{error.name} is not installed: pip install llmc", 1, debug)
    except MemoryError:
        return _fail("out of memory", 1, debug)
    except Exception as error:
        if is_usage_error(error):
            return _fail(usage_message(error), 2, debug)
        if type(error).__name__ == "Abort":
            return _stopped()
        text = f"a bug in llmc: {type(error).__name__}: {error}; `llmc --debug ...` shows where. Please report it"
        return _fail(text, 1, debug)


def _fail(message: str, status: int, debug: bool) -> int:
    from llmc.cli import output

    if debug:
        import traceback

        traceback.print_exc()
    message = " ".join(message.split())
    output.line(f"error: {message}")
    output.print_error(message)
    return status


def _stopped() -> int:
    """After Ctrl-C."""
    from llmc.cli import output

    output.line("stopped")
    output.print_error("stopped")
    return INTERRUPTED
