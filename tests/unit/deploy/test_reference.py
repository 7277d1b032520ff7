"""README's tables are what the code says."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from deploy.cli import new_parser
from deploy.local import ROOT
from deploy.reference import README, cli_reference, field_notes, rendered, yaml_reference
from deploy.spec import ClusterSpec

PACKAGES = ("core", "deploy", "decode_worker", "engine", "kv_transfer", "prefill_worker", "protos", "router")


def test_the_readme_is_up_to_date() -> None:
    text = README.read_text()
    assert rendered(text) == text, "run python -m deploy.reference"


@pytest.mark.parametrize("kind", [ClusterSpec, *(h for h in typing.get_type_hints(ClusterSpec).values() if dataclasses.is_dataclass(h))])
def test_every_key_is_explained(kind: type) -> None:
    notes = field_notes(kind)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(hints[field.name]):
            assert len(notes.get(field.name, "")) > 10, f"{kind.__name__}.{field.name} has no docstring"


def test_the_tables_cover_everything() -> None:
    table = yaml_reference()
    for key in ("name", "model.path", "engine.device", "transfer.transport", "placement.ray"):
        assert f"| `{key}` |" in table
    commands = re.findall(r"^\| `baton (\w+)", cli_reference(), re.MULTILINE)
    assert commands == ["up", "apply", "check", "scale", "status", "drain", "logs", "down", "chat"]
    assert new_parser().parse_args(["up", "x.yaml"]).file.name == "x.yaml"
    text = README.read_text()
    for option in [option for action in new_parser()._actions for option in action.option_strings if option not in ("-h", "--help")]:
        assert f"`{option}" in text, f"{option}, which goes before the command, is not in the README"


def test_paths_that_readmes_name_exist() -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()}
    folders = [ROOT / top for top in (*PACKAGES, "tests")]
    assert all((folder / "README.md").exists() for folder in folders)
    texts = {path: path.read_text() for path in [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]}
    named = [(path, found) for path, text in texts.items() for found in re.findall(r"`([\w.-]+/[\w./-]*)`", text)]
    wanted = [(path, found) for path, found in named if found.partition("/")[0] in tops]
    assert len(wanted) > 30
    assert [(str(path), found) for path, found in wanted if not (ROOT / found).exists()] == []


def test_the_life_of_a_request_goes_through_files_that_exist() -> None:
    life = README.read_text().partition("## Life of a request")[2].partition("```")[2].partition("```")[0]
    modules = [module for module in re.findall(r"\b\w+/\w+", life) if module.partition("/")[0] in PACKAGES]
    assert len(modules) >= 12
    assert [module for module in modules if not (ROOT / f"{module}.py").exists()] == []


def test_every_result_has_a_line_under_figures() -> None:
    rows = re.findall(r"^\| `([\w.-]+\.md)` \|", README.read_text().partition("## Figures")[2], re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "tests/benchmarks/results").glob("*.md"))


def test_a_readme_without_the_markers_is_refused() -> None:
    with pytest.raises(AssertionError, match="lacks"):
        rendered("# baton")
