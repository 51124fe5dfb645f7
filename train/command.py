"""How every command of this package ends: an error that the user can fix is one line, not a traceback."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from model.artifact import ArtifactError
from model.config import ConfigError
from model.runtimes import RuntimeUnavailableError
from model.verification import VerificationError


class CommandError(Exception):
    """What the user can mend, such as data or options that do not fit, explained in one line."""


def public(module: str, arguments: list[str]) -> str:
    """The command for the card, which is public: absolute paths are cut to their last part."""
    words = []
    for argument in arguments:
        # In --out=/home/me/run the path follows the sign.
        option, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        words.append(option + sign + (Path(value).name if Path(value).is_absolute() else value))
    return shlex.join(["python", "-m", module, *words])


def run(main: Callable[[], None]) -> None:
    """Call ``main``; on a user error, exit with status 1 and one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a log file gets each line as it is printed, and both in order
    try:
        main()
    except (CommandError, ArtifactError, ConfigError, RuntimeUnavailableError, VerificationError, OSError) as error:
        sys.exit(f"error: {error}")
