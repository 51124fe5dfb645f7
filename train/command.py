"""How every command of this package ends: an error that a user can mend is one line, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from model.artifact import ArtifactError
from model.classifier import VerificationError
from model.config import ConfigError
from model.runtimes import RuntimeUnavailableError


class CommandError(Exception):
    """Something wrong with what the user gave, told in one line."""


def run(main: Callable[[], None]) -> None:
    """Call ``main``; exit with status 1 and one line on an error of the user's."""
    try:
        main()
    except (CommandError, ArtifactError, ConfigError, RuntimeUnavailableError, VerificationError, OSError) as error:
        sys.exit(f"error: {error}")
