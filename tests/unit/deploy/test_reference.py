"""README's tables are what the code says."""

from __future__ import annotations

import dataclasses
import re
import typing

import pytest

from deploy.cli import new_parser
from deploy.reference import README, cli_reference, field_notes, rendered, yaml_reference
from deploy.spec import ClusterSpec


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


def test_a_readme_without_the_markers_is_refused() -> None:
    with pytest.raises(AssertionError, match="lacks"):
        rendered("# baton")
