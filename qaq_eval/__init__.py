"""The laboratory: quality and speed measurements, baselines, and the paper's experiments.

It uses only public names of `qaq_core` and `services`. Importing it registers the baselines as presets.
"""

from qaq_eval import baselines

baselines.register()
