"""The error that stops the command with one line."""

from __future__ import annotations


class ClientError(Exception):
    """Reported in one line; nothing written so far is lost."""
