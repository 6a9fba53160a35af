"""Tables that are shipped, and the weights that they are for."""

from __future__ import annotations

SMOLLM2_135M_Q4_1 = "5f4fa13bfc6dd4a91fd00e22974a9c4e9ed628fd7d7f307398ddf30260d6b2c3"

FILES = {
    "8f5ded9fd1cdf7925b518b9e6fe6ab22": SMOLLM2_135M_Q4_1,  # in float32
    "5df78654daa3bf4cba1fcd47581e9a53": SMOLLM2_135M_Q4_1,  # in float16
    "aa5d1a7dbc73bb0f21345ef5dc8d41f1": SMOLLM2_135M_Q4_1,  # in bfloat16
}
"""The fingerprint of the file by that of its weights in memory, see `models.fingerprint`: a table in `tables` has the
name of the file's, and a model that transformers loaded knows only its weights."""
