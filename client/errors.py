"""The error that stops the command with one line."""

from __future__ import annotations


class ClientError(Exception):
    """Told in one line; nothing that was written so far is lost."""
