"""Evaluation: quality and speed measurements, load tests, baselines, and the paper's experiments.

It uses only public names of `qaq_core` and `services`. Importing it registers the baselines as presets.
"""

from qaq_eval import baselines

baselines.register()
