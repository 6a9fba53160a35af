"""How setuptools compiles the C++ library: its files beside each other, on all processors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
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
