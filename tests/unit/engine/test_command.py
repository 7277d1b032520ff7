"""python -m engine, as a user meets it."""

from __future__ import annotations

import json
import logging
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from engine.__main__ import main


@pytest.fixture(scope="module")
def folder(small_checkpoint: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint with a tokenizer of one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("with tokenizer")
    for path in small_checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(512)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """The command sets up logging for its process; give the tests' back."""
    logger = logging.getLogger("baton")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["engine", *map(str, arguments)])
    return main()


def test_generate_streams_text_and_says_what_memory_is_for(folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "engine", "generate", "--model", str(folder), "--prompt", "(abc)", "--max-tokens", "7", "--ignore-eos"]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2))
    assert len(first.stdout.rstrip("\n")) == 7 and first.stdout == second.stdout
    assert "weights" in first.stderr and "[5 tokens in, 7 out" in first.stderr and "finish: length" in first.stderr


def test_seed_decides_what_is_drawn(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*arguments: object) -> str:
        assert run(monkeypatch, "generate", "--model", folder, "--prompt", "xyz", "--max-tokens", 8, "--ignore-eos", *arguments) == 0
        return capsys.readouterr().out

    assert text("--temperature", 1, "--seed", 1) == text("--temperature", 1, "--seed", 1) != text("--temperature", 1, "--seed", 2)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "-1"], "--temperature: -1 is out of range; it must be at least 0"),
        (["--temperature", "nan"], "out of range"),
        (["--temperature", "inf"], "out of range"),
        (["--top-p", "0"], "above 0 and at most 1"),
        (["--top-k", "2.5"], "invalid int value"),
        (["--min-p", "1.1"], "at least 0 and at most 1"),
        (["--max-tokens", "0"], "at least 1"),
        (["--seed", "-1"], "at least 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_naming_its_range(
    arguments: list[str], word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, "generate", "--model", "nowhere", "--prompt", "x", *arguments)
    assert word in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["generate", "--model", "{tmp}/none", "--prompt", "x"], "config.json: no such file"),
        (["generate", "--model", "{bare}", "--prompt", "x"], "tokenizer.json: no such file"),
        (["generate", "--model", "{model}", "--prompt", ""], "empty"),
        (["generate", "--model", "{model}", "--prompt", "x", "--max-tokens", "16384"], "16384"),
        (["score", "--model", "{model}", "--ids", "{tmp}/none.json", "--out", "{tmp}/x.npy"], "none.json"),
        (["score", "--model", "{model}", "--ids", "{tmp}/ids.json", "--out", "{tmp}/none/x.npy"], "does not exist"),
        (["score", "--model", "{model}", "--ids", "{tmp}/large.json", "--out", "{tmp}/x.npy"], "item 1 is 512"),
        (["score", "--model", "{model}", "--ids", "{tmp}/ids.json", "--out", "{tmp}/x.npy", "--chunk", "0"], "--chunk is 0"),
        (["score", "--model", "{model}", "--ids", "{tmp}/ids.json", "--out", "{tmp}/x.npy", "--decode-from", "4"], "[1, 3]"),
    ],
)
def test_what_cannot_run_is_one_line_of_error(
    arguments: list[str],
    word: str,
    folder: pathlib.Path,
    small_checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ids.json").write_text("[1, 2, 3]")
    (tmp_path / "large.json").write_text("[1, 512]")
    assert run(monkeypatch, *(a.format(tmp=tmp_path, model=folder, bare=small_checkpoint) for a in arguments)) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and word in errors[0]


def test_broken_tokenizer_is_named(
    small_checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text((small_checkpoint / "config.json").read_text())
    (tmp_path / "tokenizer.json").write_text("{}")
    assert run(monkeypatch, "generate", "--model", tmp_path, "--prompt", "x") == 1
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err


def test_score_writes_a_row_for_every_token(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ids.json").write_text(json.dumps(list(range(9))))
    whole, pieces = tmp_path / "whole.npy", tmp_path / "pieces.npy"
    assert run(monkeypatch, "score", "--model", folder, "--ids", tmp_path / "ids.json", "--out", whole) == 0
    assert (
        run(monkeypatch, "score", "--model", folder, "--ids", tmp_path / "ids.json", "--out", pieces, "--chunk", 2, "--decode-from", 5) == 0
    )
    logits = np.load(whole)
    assert logits.shape == (9, 512) and logits.dtype == np.float32
    assert np.array_equal(np.load(pieces), logits)
