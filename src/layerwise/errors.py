"""Errors meant for the person at the keyboard: what was given, what was expected, what to do."""

from __future__ import annotations


class LayerwiseError(Exception):
    """A failure while running that has a clear message (exit code 1)."""


class BadInput(LayerwiseError, ValueError):
    """Something that was given cannot work; found before anything was loaded, trained or written (exit code 2)."""


class Diverged(LayerwiseError):
    """Training produced a loss or a gradient that is not a number, or that has run away."""
