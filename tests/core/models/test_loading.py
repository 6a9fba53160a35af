"""Models come from directories and GGUF files; whatever is wrong with them is said in a sentence."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from qaq_core.base.errors import ConfigError, ModelLoadError
from qaq_core.models import LoadedModel, gguf, load_model, load_tokenizer
from qaq_core.models.fingerprint import left_fingerprint


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, smollm2: LoadedModel) -> Path:
    """A tiny model with the demo model's tokenizer, in a directory."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=smollm2.model.config.vocab_size,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    smollm2.tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tiny(saved: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in saved.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def test_demo_model(smollm2: LoadedModel) -> None:
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1"
    assert smollm2.context_length == 8192
    assert smollm2.eos_token_ids == (2,)
    assert smollm2.dtype is torch.float32
    assert not smollm2.model.training
    weights = smollm2.model
    assert weights.lm_head.weight.data_ptr() == weights.model.embed_tokens.weight.data_ptr()
    assert getattr(weights.config, "quantization_config", None) is None
    text = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2.tokenizer.apply_chat_template(
        text, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = weights.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])


def test_the_model_knows_its_fingerprint(smollm2: LoadedModel, saved: Path) -> None:
    assert left_fingerprint(smollm2.model) == smollm2.fingerprint
    loaded = load_model(str(saved))
    assert left_fingerprint(loaded.model) == loaded.fingerprint


def test_converted_weights_are_those_of_the_file(smollm2: LoadedModel, model_path: Path) -> None:
    from gguf import GGUFReader, dequantize

    stored = next(t for t in GGUFReader(model_path).tensors if t.name == "blk.7.ffn_down.weight")
    expected = torch.from_numpy(dequantize(stored.data, stored.tensor_type))
    assert torch.equal(smollm2.model.model.layers[7].mlp.down_proj.weight, expected)


def test_tokenizer_alone(smollm2: LoadedModel, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "empty", None)  # whoever makes a weight fails
    tokenizer = load_tokenizer(str(model_path))
    text = "Grüße, 世界! 🙂\n\tdef f(x): return x"
    assert tokenizer.encode(text) == smollm2.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.chat_template == smollm2.tokenizer.chat_template


def test_directory(saved: Path) -> None:
    stages: list[tuple[str, float]] = []
    loaded = load_model(str(saved), dtype="bfloat16", progress=lambda stage, done: stages.append((stage, done)))
    assert loaded.dtype is torch.bfloat16
    assert next(loaded.model.parameters()).dtype is torch.bfloat16
    assert loaded.context_length == 128
    assert stages[-1] == ("loading weights", 1.0)
    assert loaded.fingerprint == load_model(str(saved)).fingerprint


def test_fingerprint_follows_weights_and_configuration(saved: Path, tiny: Path) -> None:
    original = load_model(str(saved)).fingerprint
    assert load_model(str(tiny)).fingerprint == original
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, tiny / "model.safetensors", {"format": "pt"})
    changed = load_model(str(tiny)).fingerprint
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert len({original, changed, load_model(str(tiny)).fingerprint}) == 3


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/nowhere/model.gguf", "is not there"),
        ("./nowhere", "is not there"),
        ("a/b/c", "is not there"),
        ("no such model!", "is not there"),
        ("", "is not there"),
    ],
)
def test_missing(source: str, sentence: str) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelLoadError, match=sentence):
            load(source)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelLoadError, match="check the name and the network"):
        load_model("nobody/nothing-at-all")


@pytest.mark.parametrize("size", [3, 100, 50_000, 3_000_000, 98_000_000])
def test_truncated_gguf(size: int, model_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.gguf"
    with model_path.open("rb") as whole:
        file.write_bytes(whole.read(size))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelLoadError, match="download it again" if size > 3 else "not a GGUF file"):
            load(str(file))


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello, I am no model")
    (tmp_path / "text.txt").write_text("hello")
    for name, sentence in {
        "text.gguf": "not a GGUF file",
        "text.txt": "not a .gguf file",
        ".": "no config.json",
    }.items():
        with pytest.raises(ModelLoadError, match=sentence):
            load_model(str(tmp_path / name))


def test_damaged_directory(tiny: Path) -> None:
    weights = tiny / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_model(str(tiny))
    save_file({"model.norm.weight": torch.ones(32)}, weights, {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lacks .* weights"):
        load_model(str(tiny))
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"no \.safetensors"):
        load_model(str(tiny))
    (tiny / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load_tokenizer(str(tiny))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(tiny: Path, number: float) -> None:
    weights = load_file(tiny / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 7] = number
    save_file(weights, tiny / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"damaged: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_model(str(tiny))


def test_bad_device_and_dtype(saved: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        load_model(str(saved), dtype="int3")
    with pytest.raises(ConfigError, match="device"):
        load_model(str(saved), device="quantum")
    with pytest.raises(ConfigError, match="CUDA devices"):
        load_model(str(saved), device=f"cuda:{torch.cuda.device_count()}")


def test_conversion_happens_once_and_whole(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))
    started = []
    abandoned = tmp_path / "models" / f"{'ab' * 16}-1" / ".part-dead"
    abandoned.mkdir(parents=True)

    def convert(target: Path) -> None:
        started.append(target)
        assert not (target.parent / "part").exists()
        (target / "file").write_text("whole")

    results: list[Path] = []

    def run() -> None:
        results.append(gguf._once(model_path, "ab" * 32, "part", convert))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(started) == 1
    assert {(path / "file").read_text() for path in results} == {"whole"}
    assert not abandoned.exists()


def test_conversion_that_fails_leaves_nothing(
    model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QAQ_CACHE_DIR", str(tmp_path))

    def convert(target: Path) -> None:
        (target / "file").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ModelLoadError, match="QAQ_CACHE_DIR"):
        gguf._once(model_path, "cd" * 32, "part", convert)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] in ([], [".lock"])


def test_transformers_tokenizer_is_unchanged(smollm2: LoadedModel, model_path: Path) -> None:
    fresh = AutoTokenizer.from_pretrained(model_path.parent, gguf_file=model_path.name)
    text = "The quick brown fox; 12345 + 678 = ?"
    assert fresh.encode(text) == smollm2.tokenizer.encode(text)


def test_a_model_without_a_tokenizer(tiny: Path) -> None:
    for file in tiny.iterdir():
        if not file.name.startswith(("config", "model.", "generation")):
            file.unlink()
    with pytest.raises(ModelLoadError, match=r"there is no tokenizer in .*; put the model's tokenizer.json"):
        load_tokenizer(str(tiny))
