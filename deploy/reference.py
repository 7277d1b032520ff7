"""The reference tables of README.md, made from the dataclasses and the command's own parser, so that they cannot go stale.

python -m deploy.reference            rewrite them
python -m deploy.reference --check    exit 1 if README.md is not what would be written
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import pathlib
import sys
import typing
from typing import Any

from deploy.cli import new_parser
from deploy.local import ROOT
from deploy.spec import ClusterSpec

README = ROOT / "README.md"


def yaml_reference(kind: type = ClusterSpec, prefix: str = "") -> str:
    """Markdown: a table a section, a line a key."""
    hints, notes = typing.get_type_hints(kind), field_notes(kind)
    lines, sections = [], []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            sections.append(f"\n**`{field.name}`**\n\n" + yaml_reference(typing.cast(type, hint), f"{prefix}{field.name}."))
            continue
        default = "required" if field.default is field.default_factory is dataclasses.MISSING else f"`{_yaml(_default(field))}`"
        lines.append(f"| `{prefix}{field.name}` | {_type_name(hint)} | {default} | {_cell(notes[field.name])} |")
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines, *sections])


def cli_reference() -> str:
    """Markdown: a table of the subcommands with their usage."""
    (subparsers,) = [action for action in new_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    rows = []
    for name, parser in subparsers.choices.items():
        usage = " ".join(parser.format_usage().split()).removeprefix(f"usage: baton {name}").replace("[-h]", "").strip()
        rows.append(f"| `baton {name} {_cell(usage)}`".rstrip(" `") + f"` | {parser.description} |")
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def field_notes(kind: type) -> dict[str, str]:
    """Field name -> the docstring below it. Raises KeyError for a field that has none when it is looked up."""
    (body,) = [node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef)]
    notes = {}
    for statement, following in zip(body, body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            assert isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
            notes[statement.target.id] = " ".join(str(following.value.value).split())
    return notes


def rendered(text: str) -> str:
    """README's text with both references brought up to date."""
    for name, content in (("yaml", yaml_reference()), ("cli", cli_reference())):
        begin, end = f"<!-- {name} reference: python -m deploy.reference -->", f"<!-- end of {name} reference -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        assert found, f"README.md lacks {begin!r} or {end!r}"
        text = f"{head}{begin}\n{content}\n{end}{tail}"
    return text


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"{value:_}" if isinstance(value, int) and value >= 100_000 else f"{value:g}"
    if isinstance(value, str):
        return value or '""'
    assert value == {}, f"{value=}"
    return "{}"


def _type_name(hint: Any) -> str:
    return "mapping of text" if typing.get_origin(hint) is dict else _NAMES[hint]


_NAMES = {str: "text", int: "whole number", float: "number", bool: "true, false"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only, change nothing")
    is_check = parser.parse_args().check
    before = README.read_text()
    after = rendered(before)
    if is_check and before != after:
        print("README.md is stale: run python -m deploy.reference", file=sys.stderr)
        return 1
    if not is_check:
        pathlib.Path(README).write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
