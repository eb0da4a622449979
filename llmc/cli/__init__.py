"""The command line: `llmc COMMAND ...`. What commands do stands in other rooms; here are options and output."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llmc.errors import LlmcError

__all__ = ["main", "run"]

# What a machine that only runs models does not have: the packages of llmc[compile], as they are imported.
COMPILING = frozenset({"ml_dtypes", "tvm", "torch", "transformers", "safetensors", "huggingface_hub"})
INTERRUPTED = 130  # what shells expect of a program that Ctrl-C ended


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status: 0; 1 after an error; 2 for a wrong command line.

    An error is one line on stderr. With --json there is also an object {"error": ...} on stdout. A traceback is shown
    only with `llmc --debug ...` or LLMC_DEBUG=1.
    """
    from llmc.cli import output
    from llmc.cli.app import command
    from llmc.cli.usage import is_usage_error, usage_message

    before_dashes = list(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    as_json = "--json" in before_dashes
    debug = "--debug" in before_dashes[:1] or os.environ.get("LLMC_DEBUG", "") not in ("", "0")
    try:
        result = command().main(args=list(arguments), prog_name="llmc", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:
            output.line("stopped")
        return result if isinstance(result, int) else 0
    except LlmcError as error:
        return _fail(str(error), 1, as_json, debug)
    except KeyboardInterrupt:
        output.line("stopped")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", 1, as_json, debug)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in COMPILING:
            return _fail(f"compiling a model needs {error.name}: pip install 'llmc[compile]'", 1, as_json, debug)
        return _fail(f"{error.name} is not installed: pip install llmc", 1, as_json, debug)
    except MemoryError:
        return _fail("out of memory", 1, as_json, debug)
    except Exception as error:
        if is_usage_error(error):
            return _fail(usage_message(error), 2, as_json, debug)
        if type(error).__name__ == "Abort":
            output.line("stopped")
            return INTERRUPTED
        text = f"a bug in llmc: {type(error).__name__}: {error}; `llmc --debug ...` shows where. Please report it"
        return _fail(text, 1, as_json, debug)


def _fail(message: str, status: int, as_json: bool, debug: bool) -> int:
    from llmc.cli import output

    if debug:
        import traceback

        traceback.print_exc()
    message = " ".join(message.split())
    output.line(f"error: {message}")
    if as_json:
        output.print_json({"error": message})
    return status
