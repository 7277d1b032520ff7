"""What the documents name is there: keys of the cluster file, commands, modules, files, metrics."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import typing

import pytest

from deploy.reference import cli_reference
from deploy.spec import ClusterSpec

ROOT = pathlib.Path(__file__).resolve().parents[3]
FOLDERS = ("core", "decode_worker", "deploy", "engine", "kv_transfer", "prefill_worker", "protos", "router", "tests")
FILES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
DOCUMENTS = [*ROOT.glob("*.md"), *(path for path in FILES if path.suffix == ".md" and "results" not in path.parts)]
SOURCE = "\n".join(path.read_text() for path in FILES if path.suffix == ".py" and ROOT / "tests" not in path.parents)
NAMES = {path.name for path in FILES} | {path.name for path in ROOT.iterdir()}
MADE = {"cluster.json", "cluster.yaml", "metrics_targets.json", "summary.txt"}
"""Files that a cluster or a tool writes."""


def keys_of(kind: type, prefix: str = "") -> set[str]:
    hints, found = typing.get_type_hints(kind), set()
    for field in dataclasses.fields(kind):
        found.add(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            found |= keys_of(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.")
    return found


KEYS = keys_of(ClusterSpec)
SECTIONS = "|".join(sorted({key.partition(".")[0] for key in KEYS if "." in key}))


def unknown_names(text: str) -> list[str]:
    """What `text` names and is nowhere. Log events look like keys, and stand in the source as such."""
    code = re.findall(r"`([^`\n]+)`", text)
    lost = []
    for span in code:
        keys = re.findall(rf"(?<![\w./])(?:{SECTIONS})\.[a-z_]+(?![\w./])", span)
        lost += [key for key in keys if key not in KEYS and f'"{key}"' not in SOURCE and not key.endswith((".py", ".proto"))]
        metrics = re.findall(r"\bbaton_[a-z0-9_]+(?![\w*])", span)
        lost += [name for name in metrics if not any(form in SOURCE for form in forms_of(name))]
        if re.fullmatch(r"[\w./-]+\.(py|md|yaml|json|proto|sh|png|html)", span) and pathlib.Path(span).name not in NAMES | MADE:
            lost.append(span)
    for module in re.findall(r"python3? -m ((?:core|deploy|engine|router|prefill_worker|decode_worker|protos|tests)[\w.]*)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            lost.append(module)
    return lost


def forms_of(metric: str) -> tuple[str, ...]:
    """How a metric may stand in the source: without what Prometheus appends, with the role put in."""
    bare = re.sub(r"_(total|bucket|sum|count)$", "", metric)
    return bare, re.sub(r"^baton_(prefill|decode)_", "baton_{self._role}_", bare)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_is_there(path: pathlib.Path) -> None:
    history = {"prefill.ready", "decode.ready"}
    """Of the changelog."""
    assert not set(unknown_names(path.read_text())) - history


@pytest.mark.parametrize(
    "text",
    [
        "`prefill.replica`",
        "`engine.ops.x` and `transfer.retries`",
        "`baton_router_nothing_total`",
        "`nowhere.py`",
        "`python -m deploy.nothing`",
    ],
)
def test_a_name_that_is_nowhere_is_found(text: str) -> None:
    assert unknown_names(text)


def test_every_command_of_the_documents_exists() -> None:
    known = set(re.findall(r"^\| `baton (\w+)", cli_reference(), re.MULTILINE))
    text = "".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"`(?:\.venv/bin/)?baton ([a-z]+)", text))
    for block in text.split("```")[1::2]:
        named |= set(re.findall(r"^(?:\.venv/bin/)?baton ([a-z]+)", block, re.MULTILINE))
    assert {"up", "scale"} <= named <= known, named - known


def test_sections_that_docstrings_name_are_there() -> None:
    there = set(re.findall(r"^##+ ([\d.]+)", (ROOT / "engine/model/deepseek_v4.md").read_text(), re.MULTILINE))
    lists = re.findall(r"(?:\(spec|deepseek_v4\.md,) (\d[\d., and]*)", SOURCE)
    named = {number.rstrip(".") for text in lists for number in re.findall(r"\d[\d.]*", text)}
    assert {"2.0", "2.4", "4.2", "6"} <= named <= there, named - there
