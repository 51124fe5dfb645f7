"""How every command of this package ends: an error that the user can fix is one line, not a traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

from model.artifact import ArtifactError
from model.config import ConfigError
from model.runtimes import RuntimeUnavailableError
from model.verification import VerificationError


class CommandError(Exception):
    """What the user can mend, such as data or options that do not fit, explained in one line."""


def run(main: Callable[[], None]) -> None:
    """Call ``main``; on a user error, exit with status 1 and one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # a log file gets each line as it is printed, and both in order
    try:
        main()
    except (CommandError, ArtifactError, ConfigError, RuntimeUnavailableError, VerificationError, OSError) as error:
        sys.exit(f"error: {error}")
