"""Evaluation: quality and speed measurements, load tests, baselines, and the paper's experiments.

It uses only public names of `qaq_core` and `services`. Importing `qaq_eval.baselines` registers the baselines as
presets; this package itself imports nothing, because every start of `qaq` looks here for commands.
"""
