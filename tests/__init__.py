"""All tests. Triton decides when it is first imported, by transformers, whether kernels are interpreted."""

import os

os.environ["TRITON_INTERPRET"] = "1"
