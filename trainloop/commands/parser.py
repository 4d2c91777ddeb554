"""Declares commands, and reports errors in their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_CODES = "exit codes: 0 all is well; 1 something is damaged or has failed; 2 the command line is wrong"


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message.rstrip('.')}. See --help\n")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    what: str,
    more: str,
    exit_codes: str = EXIT_CODES,
) -> Parser:
    """Declare a command.

    Args:
        commands: The subparsers that it is added to.
        name: The name that the user types.
        run: Runs the command, and returns the exit code.
        what: One line for the list of commands.
        more: The text for the command's own help.
        exit_codes: The meaning of the exit codes.
    """
    # No abbreviations: `--y` must not remove anything, and a future option must not change what an abbreviation means.
    made: Parser = commands.add_parser(name, help=what, description=more, epilog=exit_codes, allow_abbrev=False)
    made.set_defaults(run=run)
    return made
