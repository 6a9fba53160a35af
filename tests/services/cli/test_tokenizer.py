from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer
from typer.testing import CliRunner

from qaq_core.models import load_tokenizer
from services.cli.main import app


def test_load_clients_read_what_it_writes(tmp_path: Path, model_path: Path) -> None:
    target = tmp_path / "tokenizer"
    asked = ["tokenizer", "--output", str(target), "--model", str(model_path)]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    written, own = AutoTokenizer.from_pretrained(target, local_files_only=True), load_tokenizer(str(model_path))
    text = "Zażółć 🏔️ — the end"
    messages = [{"role": "user", "content": text}]
    assert written.encode(text) == own.encode(text)
    assert written.apply_chat_template(messages, tokenize=False) == own.apply_chat_template(messages, tokenize=False)
    again = CliRunner().invoke(app, asked)
    assert again.exit_code == 1
    assert "has files already" in again.output
