"""The `regard` command.

A thin shell over the library: each command reads its arguments, checks them before any work, and
calls one function. Nothing heavy is imported until a command needs it, so `regard --help` is
instant.
"""

from __future__ import annotations

from regard.cli import build, merge, papers, see, shrink, study  # noqa: F401  (each registers its commands)
from regard.cli._app import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the `regard` command."""
    app()
