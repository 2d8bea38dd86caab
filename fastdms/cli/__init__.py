"""The command line: ``fastdms generate``, ``fastdms chat``, ``fastdms inspect`` and the tools."""

from fastdms.cli.main import main

__all__ = ["main"]
