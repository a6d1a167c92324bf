"""The pdserve command."""

from pdserve.cli.app import main

__all__ = ["main"]
