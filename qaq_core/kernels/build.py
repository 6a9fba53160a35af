"""How setuptools compiles the C++ library: its files beside each other, on all processors; and CUDA kernels."""

from __future__ import annotations

import os
import runpy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    """Named in pyproject.toml. Nothing else imports it."""

    def build_extensions(self) -> None:
        compiler: Any = self.compiler
        one_after_the_other = compiler.compile

        def beside_each_other(sources: Sequence[str], *arguments: Any, **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: one_after_the_other([source], *arguments, **options), sources)
                return list(chain.from_iterable(made))

        compiler.compile = beside_each_other
        super().build_extensions()
        self._build_cuda(Path(self.get_ext_fullpath("qaq_core.kernels._cpu")).parent / "cuda")

    def _build_cuda(self, folder: Path) -> None:
        """The kernels for GPUs, if QAQ_CUDA is 1: it takes minutes. They are left out where it fails."""
        if os.environ.get("QAQ_CUDA") != "1":
            return
        cuda = runpy.run_path(str(Path(__file__).parent / "cuda" / "build.py"), run_name="qaq_cuda_build")
        reason = cuda["missing"]()
        try:
            if reason is None:
                cuda["build"](folder)
        except RuntimeError as error:
            reason = str(error)
        if reason is not None:
            self.warn(f"CUDA kernels are left out: {reason}")
