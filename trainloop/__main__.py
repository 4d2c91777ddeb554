"""The command line: `trainloop COMMAND`, or `python -m trainloop COMMAND`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .commands import checkpoints, diff, evaluate, plot, prove, runs, tokens
from .commands.parser import Parser
from .errors import CheckpointError

_COMMANDS = (checkpoints, evaluate, prove, runs, plot, diff, tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The arguments of the command line. None: those of this process.

    Returns:
        The exit code.
    """
    parser = _make_parser()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        parser.print_help()
        return 0
    arguments, launch_options = prove.split_launch_options(arguments)
    options = parser.parse_args(arguments)
    options.launch = launch_options
    logging.basicConfig(format="%(message)s")  # warnings, to stderr
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output is gone, for example `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (CheckpointError, OSError, ValueError) as ex:
        told = f"{ex.filename}: {ex.strerror}" if isinstance(ex, OSError) and ex.filename else str(ex)
        print(f"{parser.prog}: error: {told.rstrip('.')}.", file=sys.stderr)
        return 2 if isinstance(ex, ValueError) else 1


def _make_parser() -> Parser:
    is_script = Path(sys.argv[0]).name in ("trainloop", "trainloop.exe")
    prog = "trainloop" if is_script else "python -m trainloop"
    parser = Parser(prog=prog, description="Tools for what trainloop leaves on the disk.")
    areas = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(areas)
    return parser


if __name__ == "__main__":
    sys.exit(main())
