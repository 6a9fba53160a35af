"""Which attention runs on a device, and what is said when it cannot."""

from __future__ import annotations

import logging
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qaq_core.attention import CudaAttention, ReferenceAttention, triton_missing
from qaq_core.attention.cuda_tables import refused_codec
from qaq_core.base.errors import ConfigError
from qaq_core.cache import backends
from qaq_core.kernels import choice
from qaq_core.kernels import library as native
from qaq_core.kernels.cuda.emulation import Emulation
from qaq_core.models import ModelShape
from qaq_core.quantization.codecs import GaussianCodec, UniformCodec
from qaq_core.storage import Weaver

CPU, META, CUDA = (torch.device(name) for name in ("cpu", "meta", "cuda"))
CODEC = GaussianCodec()


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAQ_KERNEL", raising=False)
    backends._log_kernel.cache_clear()


def test_it_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_KERNEL", "reference")
    assert backends.make_attention(CODEC, CPU).name == "reference"
    assert backends.make_attention(CODEC, CPU, "triton").name == "triton (interpreted)"
    monkeypatch.setenv("QAQ_KERNEL", "quick")
    with pytest.raises(ConfigError, match="quick"):
        backends.make_attention(CODEC, CPU)


def test_auto_takes_the_fastest() -> None:
    built = native.load_library() is not None
    assert backends.make_attention(CODEC, CPU).name.startswith("cpu" if built else "reference")
    assert backends.make_attention(CODEC, META).name == "reference"


@pytest.mark.parametrize(("kernel", "device"), [("cpu", META), ("cpu", CUDA), ("triton", CUDA), ("cuda", META)])
def test_a_kernel_for_another_device_is_refused(kernel: str, device: torch.device) -> None:
    with pytest.raises(ConfigError, match=device.type):
        backends.make_attention(CODEC, device, kernel)


def test_without_the_library_the_reference_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (None, "it is not built: install a compiler"))
    monkeypatch.setattr(choice, "load_library", lambda: None)
    with caplog.at_level(logging.INFO, "qaq_core.cache.backends"):
        for _ in range(2):
            assert backends.make_attention(CODEC, CPU).name == "reference"
    assert [record.message for record in caplog.records] == [
        "attention kernel: reference; for a faster one: it is not built: install a compiler"
    ]
    with pytest.raises(ConfigError, match="compiler"):
        backends.make_attention(CODEC, CPU, "cpu")


def test_a_library_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_LIBRARY", "/nowhere/_cpu.so")
    loaded, reason = native._load.__wrapped__()
    assert loaded is None
    assert reason is not None
    assert "QAQ_LIBRARY" in reason


def test_a_library_of_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.load_library() is None:
        pytest.skip("the C++ library is not built")
    monkeypatch.setattr(native, "INTERFACE", native.INTERFACE + 1)
    loaded, reason = native._load.__wrapped__()
    assert loaded is None
    assert reason is not None
    assert "reinstall" in reason


def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1"):
        backends.make_attention(CODEC, CPU, "triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="pip install"):
        backends.make_attention(CODEC, CPU, "triton")
    assert backends.faster_kernel(CUDA) == f"there is no CUDA device; {triton_missing(CUDA)}"


def test_cuda_kernels_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QAQ_EMULATE", raising=False)
    with pytest.raises(ConfigError, match=r"^QAQ_KERNEL=cuda: on a CPU .* set QAQ_EMULATE=1$"):
        backends.make_attention(CODEC, CPU, "cuda")
    with pytest.raises(ConfigError, match=r"^QAQ_KERNEL=cuda: there is no CUDA device$"):
        backends.make_attention(CODEC, CUDA, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ConfigError, match=r"^QAQ_KERNEL=cuda: there are no CUDA kernels for compute capability 7\.5$"):
        backends.make_attention(CODEC, CUDA, "cuda")


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile them for a CPU")
def test_cuda_kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_EMULATE", "1")
    assert backends.make_attention(CODEC, CPU, "cuda").name == "cuda (emulated)"


@pytest.mark.parametrize(("head_dim", "tiled"), [(64, True), (32, False)])
def test_rows_are_in_tiles_where_cuda_kernels_read_them(head_dim: int, tiled: bool) -> None:
    attention = CudaAttention(CODEC, CPU, Emulation())
    shape = ModelShape(2, 4, 2, head_dim, torch.zeros(1, head_dim // 2), (0, 0))
    assert isinstance(backends.make_repacker(CPU, "reference", attention, shape), Weaver) == tiled
    assert not isinstance(backends.make_repacker(CPU, "reference", ReferenceAttention(CODEC, CPU), shape), Weaver)


def test_auto_takes_cuda_kernels_where_they_are_compiled_for_the_device(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[str, torch.device]] = []

    def attention(name: str) -> Any:
        return lambda codec, device, *launcher: made.append((name, device)) or SimpleNamespace(name=name)

    for name in ("Cuda", "Triton"):
        monkeypatch.setattr(backends, f"{name}Attention", attention(name.lower()))
    monkeypatch.setattr(backends, "cuda_launcher", lambda device: None)
    monkeypatch.setattr(backends, "triton_missing", lambda device: None)
    monkeypatch.setattr(backends, "cuda_missing", lambda device: None)
    backends.make_attention(CODEC, CUDA)
    uniform = UniformCodec("head")
    assert refused_codec(uniform) is not None
    backends.make_attention(uniform, CUDA)
    monkeypatch.setattr(backends, "cuda_missing", lambda device: "the CUDA kernels are not built: build them")
    with caplog.at_level(logging.INFO, "qaq_core.cache.backends"):
        backends.make_attention(CODEC, CUDA)
    assert made == [("cuda", CUDA), ("triton", CUDA), ("triton", CUDA)]
    assert caplog.messages == ["attention kernel: triton; for a faster one: the CUDA kernels are not built: build them"]
