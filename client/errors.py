"""What stops the command."""

from __future__ import annotations


class ClientError(Exception):
    """Told in one line; nothing that was written so far is lost."""
