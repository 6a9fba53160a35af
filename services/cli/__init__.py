"""The `qaq` command. Commands import what they need when they run, so that `qaq --help` is quick."""

from services.cli.main import app

__all__ = ["app"]
