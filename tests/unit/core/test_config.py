"""The file reader: what it takes, and the sentence it answers with when it does not."""

from __future__ import annotations

import pathlib
import random
from dataclasses import dataclass, field

import pytest

from core.config import MAX_FILE_BYTES, differences, load_config, parse_config, to_yaml
from core.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    replicas: int = 1
    weight: float = 1.0
    labels: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.replicas < 0:
            raise ConfigError(f"prefill.replicas is {self.replicas}; it must be at least 0")
        if self.weight > 100:
            raise CheckpointError("too heavy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    path: str
    name: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    name: str
    model: Model
    prefill: Pool = field(default_factory=Pool)
    is_fast: bool = False


GOOD = """\
# a comment
name: demo
model:
  path: "a folder/with spaces"
prefill:
  replicas: 2
  weight: 1e-6
  labels: {zone: no, rack: "7"}
is_fast: true
"""


def read(text: str, *overrides: str) -> File:
    return parse_config(text, "c.yaml", File, overrides)


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, *overrides)
    return str(caught.value)


def test_a_good_file_becomes_the_dataclasses() -> None:
    config = read(GOOD)
    assert config.name == "demo" and config.model == Model(path="a folder/with spaces")
    assert config.prefill == Pool(replicas=2, weight=1e-6, labels={"zone": "no", "rack": "7"})
    assert config.is_fast


def test_an_empty_section_means_its_defaults() -> None:
    assert read("name: x\nmodel: {path: p}\nprefill:\n").prefill == Pool()


def test_a_value_that_is_left_out_is_refused() -> None:
    assert refusal("name: x\nmodel: {path: p}\nprefill:\n  replicas:\n") == (
        "c.yaml:4: prefill.replicas must be a whole number, found nothing"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmodel: {path: p}\nprefil:\n  replicas: 1\n", "c.yaml:3: unknown key 'prefil' in the file; did you mean 'prefill'?"),
        (
            "name: x\nmodel: {path: p}\nprefill:\n  replica: 1\n",
            "c.yaml:4: unknown key 'replica' in prefill; did you mean 'replicas'?",
        ),
        ("name: x\nmodel: {path: p}\nqqq: 1\n", "c.yaml:3: unknown key 'qqq' in the file; known are name, model, prefill, is_fast"),
        ("name: x\n", "c.yaml:1: the file lacks the required key 'model'"),
        ("name: x\nmodel:\n  name: y\n", "c.yaml:2: model lacks the required key 'path'"),
        ("name: x\nname: y\n", "c.yaml:2: 'name' is given twice, first in line 1"),
        ("name: x\nmodel: {path: p}\nprefill: 3\n", "c.yaml:3: prefill must be a mapping, found '3'"),
        (
            "name: x\nmodel: {path: p}\nprefill:\n  replicas: '3'\n",
            "c.yaml:4: prefill.replicas must be a whole number, found '3' in quotes",
        ),
        ("name: x\nmodel: {path: p}\nprefill:\n  replicas: 1.5\n", "c.yaml:4: prefill.replicas must be a whole number, found '1.5'"),
        ("name: x\nmodel: {path: p}\nprefill:\n  weight: .inf\n", "c.yaml:4: prefill.weight must be a number, found '.inf'"),
        ("name: x\nmodel: {path: p}\nis_fast: yes\n", "c.yaml:3: is_fast must be true or false, found 'yes'"),
        ("name: []\nmodel: {path: p}\n", "c.yaml:1: name must be text, found a list"),
        (
            "name: x\nmodel: {path: p}\nprefill:\n  weight: 1\n  replicas: -1\n",
            "c.yaml:5: prefill.replicas is -1; it must be at least 0",
        ),
        ("name: x\nmodel: {path: p}\nprefill:\n  weight: 101\n", "c.yaml:3: too heavy"),
        ("", "c.yaml: the file is empty; it needs the keys name, model"),
        ("# nothing\n", "c.yaml: the file is empty; it needs the keys name, model"),
        ("- a\n- b\n", "c.yaml:1: the file must be a mapping, found a list"),
        ("name: x\n---\nname: y\n", "c.yaml:2: a second document starts here; the file must hold one"),
        ("name: x\n\tmodel: y\n", "c.yaml:2: not valid YAML: found character '\\t' that cannot start any token"),
        ("name: x\nmodel: {path: \0}\n", "c.yaml:2: not a text file: it holds the character '\\x00'"),
        ("[1]: x\n", "c.yaml:1: a key must be a word, found a list"),
        ("a: &x [1]\nb: *x\n", "c.yaml:1: anchors and aliases"),
        ("name: !!python/object:os.system x\n", "c.yaml:1: tags (here 'tag:yaml.org,2002:python/object:os.system')"),
        ("a: " + "[" * 100 + "]" * 100, "c.yaml:1: nested deeper than 16 levels"),
        ("name: " + "9" * 5000 + "\nmodel: {path: p}\nprefill: {replicas: " + "9" * 5000 + "}", "c.yaml:3: prefill.replicas must be"),
        ('name: "\\UFFFFFFFF"', "c.yaml: not valid YAML: "),
        ('name: "\\uD800"\nmodel: {path: p}', "c.yaml:1: name must be text without surrogates"),
        ("x" * (MAX_FILE_BYTES + 1), "c.yaml: larger than 65536"),
    ],
)
def test_a_refusal_says_where_what_and_what_is_allowed(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_an_error_of_a_dataclass_keeps_its_class() -> None:
    with pytest.raises(CheckpointError, match="too heavy"):
        read("name: x\nmodel: {path: p}\nprefill: {weight: 101}")


def test_overrides_reach_any_key() -> None:
    config = read("name: x\nmodel: {path: p}\nprefill:\n", "prefill.replicas=3", "model.name=a b", "prefill.labels.zone=z")
    assert config.prefill == Pool(replicas=3, labels={"zone": "z"})
    assert config.model.name == "a b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prefill.replicas", "override 'prefill.replicas': expected KEY=VALUE"),
        ("=1", "override '=1': expected KEY=VALUE"),
        ("prefill.replicas=many", "override 'prefill.replicas=many': prefill.replicas must be a whole number, found 'many'"),
        ("prefill.replicas=-1", "override 'prefill.replicas=-1': prefill.replicas is -1"),
        ("prefill.replikas=1", "override 'prefill.replikas=1': unknown key 'replikas' in prefill; did you mean 'replicas'?"),
        ("name.x=1", "override 'name.x=1': c.yaml:2 holds 'demo', not a section"),
        ("name=[1", "override 'name=[1':1: not valid YAML"),
        ("prefill.labels={a: []}", "override 'prefill.labels={a: []}': prefill.labels.a must be text, found a list"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    assert refusal(GOOD, override).startswith(message)


def test_files_that_cannot_be_read_are_named(tmp_path: pathlib.Path) -> None:
    for name, content in (("binary", b"name: \xff\xfe"), ("huge", b"#" * (MAX_FILE_BYTES + 1)), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
    expected = {"missing": "No such file", "binary": ":1: not UTF-8", "huge": "larger than", "empty": "empty", ".": "Is a"}
    for name, message in expected.items():
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(tmp_path / name, File)
        assert str(tmp_path) in str(caught.value)


def test_a_byte_order_mark_is_no_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_config(tmp_path / "bom.yaml", File) == read(GOOD)


def test_differences_name_the_keys() -> None:
    assert differences(read(GOOD), read(GOOD)) == []
    assert differences(read(GOOD), read(GOOD, "prefill.replicas=4", "name=n")) == ["name: 'demo' -> 'n'", "prefill.replicas: 2 -> 4"]


@pytest.mark.parametrize(
    "text", ["no", "1e3", "~", "", "a: b", "two\nlines", "\u2028", "1:30", " x ", "'", '"', "#", "é", "\x85", "\t", "|", "!x"]
)
def test_what_is_written_reads_back(text: str) -> None:
    model, pool = Model(path=text), Pool(weight=1e-9, labels={text or "k": text})
    config = File(name=text, model=model, prefill=pool, is_fast=True)
    assert read(to_yaml(config)) == config


_SPICE = ["\t", ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!x ", "\0", "\x85", '"', "'", "|", ">", "%", "@", "#", "\n", "---\n", "?",
          "<<", "\\", "\r", "\u2028", "9" * 400, "é", "\ud7ff", "~", "null", ".nan", "0x1f", "1:30", "  ", "\ufeff"]  # fmt: skip


@pytest.mark.parametrize("seed", range(600))
def test_a_damaged_file_is_read_or_refused_but_nothing_else(seed: int, tmp_path: pathlib.Path) -> None:
    rng = random.Random(seed)
    raw = bytearray(GOOD.encode())
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(5):
            case 0:
                raw[at:at] = rng.choice(_SPICE).encode()
            case 1:
                del raw[at : at + rng.randint(1, 12)]
            case 2:
                raw[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                other = rng.randrange(len(raw) + 1)
                raw[at:at] = raw[other : other + rng.randint(1, 60)]
            case _:
                raw = raw[:at] if rng.random() < 0.3 else raw
    path = tmp_path / "c.yaml"
    path.write_bytes(raw)
    try:
        config = load_config(path, File)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(str(path))
    else:
        assert isinstance(config, File)


def test_most_damaged_files_are_refused() -> None:
    """The fuzz above would pass if everything were accepted."""
    rng, refused = random.Random(1), 0
    for _ in range(200):
        text = list(GOOD)
        for _ in range(10):
            text[rng.randrange(len(text))] = rng.choice(_SPICE)
        try:
            parse_config("".join(text), "c.yaml", File)
        except ConfigError:
            refused += 1
    assert refused > 190
