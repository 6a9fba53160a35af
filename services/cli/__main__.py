"""`python -m services.cli`: the `qaq` command where it is not installed."""

from services.cli import run

run()
