"""A YAML file -> frozen dataclasses, or one sentence that says what is wrong, where, and what is allowed.

    spec = load_config(pathlib.Path("cluster.yaml"), ClusterSpec, overrides=["prefill.replicas=2"])

The dataclasses are the schema: keys are fields, a field without a default is required. Types: bool, int, float, str, nested
dataclasses, `dict[str, X]`, and `Any` for what another reader checks, which becomes None. Scalars are read by the declared type (`no`
is text where text is wanted, 1e-6 is a number, quoted digits are not), so none of YAML's surprises apply. Anchors, tags and several
documents are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import pathlib
import re
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from core.errors import ConfigError

T = TypeVar("T")

MAX_FILE_BYTES = 65_536
MAX_DEPTH = 16
"""Nested mappings and lists; the cluster file needs three."""

_INTEGER = re.compile(r"[+-]?[0-9][0-9_]*")
_NUMBER = re.compile(r"[+-]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NULLS = ("", "~", "null")


@dataclass(slots=True)
class _Node:
    """One value of the file. `where` is "file:line" or names the override that set it."""

    where: str
    value: str | list[_Node] | dict[str, _Node]
    is_plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.is_plain and isinstance(self.value, str) and self.value in _NULLS

    def describe(self) -> str:
        if isinstance(self.value, dict):
            return "a mapping"
        if isinstance(self.value, list):
            return "a list"
        if self.is_null:
            return "nothing"
        return repr(self.value[:80]) + ("" if self.is_plain else " in quotes")


def load_config(path: pathlib.Path, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """Read `path` as a `kind`. Raises ConfigError, whose message starts with the file and line."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes, which no cluster file needs")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte {raw[error.start]:#04x})") from error
    return parse_config(text, str(path), kind, overrides)


def parse_config(text: str, source: str, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """As `load_config`, from text; `source` names it in errors. Overrides are `dotted.key=value`, the value in YAML."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_FILE_BYTES} characters, which no cluster file needs")
    root = _parse(text, source)
    if root is None or root.is_null:
        raise ConfigError(f"{source}: the file is empty; it needs {_required(kind)}")
    for override in overrides:
        _apply(root, override)
    value = _build(root, kind, "", root)
    assert isinstance(value, kind)
    return value


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """What changed between two dataclasses of one type: lines like "prefill.replicas: 1 -> 2"."""
    changes: list[str] = []
    for field in dataclasses.fields(new):
        before, after, path = getattr(old, field.name), getattr(new, field.name), prefix + field.name
        if dataclasses.is_dataclass(after) and dataclasses.is_dataclass(before):
            changes += differences(before, after, path + ".")
        elif before != after:
            changes.append(f"{path}: {before!r} -> {after!r}")
    return changes


def to_yaml(config: Any) -> str:
    """The YAML text that `parse_config` reads back as an equal dataclass."""
    text = yaml.safe_dump(_plain(config), sort_keys=False, width=1000)
    assert isinstance(text, str)
    return text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _required(kind: type) -> str:
    names = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return f"the keys {', '.join(names)}" if names else f"keys among {', '.join(f.name for f in dataclasses.fields(kind))}"


# Text -> nodes


def _parse(text: str, source: str) -> _Node | None:
    """The only document of the text; None if there is none."""

    def refuse(event: Any, what: str) -> ConfigError:
        return ConfigError(f"{source}:{event.start_mark.line + 1}: {what}")

    def node(event: Any, events: Iterator[Any], depth: int) -> _Node:
        where = f"{source}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise refuse(event, "anchors and aliases (& and *) are not used in this file; write the value out, or quote it if it is text")
        if event.tag is not None:
            raise refuse(event, f"tags (here {event.tag!r}) are not used in this file; quote the value if it is text")
        if isinstance(event, yaml.ScalarEvent):
            return _Node(where, event.value, is_plain=event.style is None)
        if depth == MAX_DEPTH:
            raise refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[_Node] = []
            while not isinstance(event := next(events), yaml.SequenceEndEvent):
                items.append(node(event, events, depth + 1))
            return _Node(where, items)
        assert isinstance(event, yaml.MappingStartEvent), event
        entries: dict[str, _Node] = {}
        first: dict[str, int] = {}
        while not isinstance(event := next(events), yaml.MappingEndEvent):
            key = node(event, events, depth + 1)
            if not isinstance(key.value, str) or key.is_null:
                raise refuse(event, f"a key must be a word, found {key.describe()}")
            if key.value in entries:
                raise refuse(event, f"{key.value!r} is given twice, first in line {first[key.value]}")
            first[key.value] = event.start_mark.line + 1
            entries[key.value] = node(next(events), events, depth + 1)
            entries[key.value].where = key.where
        return _Node(where, entries)

    root: _Node | None = None
    try:
        events = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise refuse(event, "a second document starts here; the file must hold one")
                root = node(next(events), events, 0)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{line}: not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        row = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{source}:{row}: not a text file: it holds the character {chr(error.character)!r}") from error
    except (ValueError, OverflowError) as error:  # an escape like "\UFFFFFFFF" in a quoted scalar
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    return root


def _apply(root: _Node, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not _DOTTED.fullmatch(path):
        raise ConfigError(f"override {override!r}: expected KEY=VALUE with a dotted key, e.g. prefill.replicas=2")
    where = f"override {override!r}"
    value = _parse(text, where) or _Node(where, "")
    *sections, last = path.split(".")
    holder = root
    for section in sections:
        if not isinstance(holder.value, dict):
            break
        child = holder.value.setdefault(section, _Node(where, {}))
        if child.is_null:
            child.value = {}
        holder = child
    if not isinstance(holder.value, dict):
        raise ConfigError(f"{where}: {holder.where} holds {holder.describe()}, not a section")
    _relocate(value, where)
    holder.value[last] = value


def _relocate(node: _Node, where: str) -> None:
    node.where = where
    children: Iterable[_Node] = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    for child in children:
        _relocate(child, where)


# Nodes -> values


def _build(node: _Node, kind: Any, path: str, root: _Node) -> Any:
    """`node` as a value of the annotated type `kind`; `path` is its dotted name, "" for the file."""
    if kind is Any:
        return None
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(node, kind, path, root)
    if typing.get_origin(kind) is dict:
        if node.is_null:
            return {}
        if not isinstance(node.value, dict):
            raise _wrong(node, path, "a mapping")
        return {key: _build(item, typing.get_args(kind)[1], f"{path}.{key}", root) for key, item in node.value.items()}
    return _build_scalar(node, kind, path)


def _build_dataclass(node: _Node, kind: type, path: str, root: _Node) -> Any:
    if node.is_null:
        node = _Node(node.where, {})
    if not isinstance(node.value, dict):
        raise _wrong(node, path, "a mapping")
    place = path or "the file"
    hints, fields = typing.get_type_hints(kind), dataclasses.fields(kind)
    names = [field.name for field in fields]
    for key, item in node.value.items():
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(names)}"
            raise ConfigError(f"{item.where}: unknown key {key[:80]!r} in {place}; {hint}")
    for field in fields:
        if field.name not in node.value and field.default is field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{node.where}: {place} lacks the required key {field.name!r}")
    values = {key: _build(item, hints[key], f"{path}.{key}" if path else key, root) for key, item in node.value.items()}
    try:
        return kind(**values)
    except ConfigError as error:
        raise type(error)(f"{_where(str(error), node, root)}: {error}") from error


def _where(message: str, node: _Node, root: _Node) -> str:
    """The line of the first key of this file that the message names (as section.key), else that of the section at hand."""
    for found in _DOTTED.finditer(message):
        here = root
        for name in found.group().split("."):
            if not isinstance(here.value, dict) or name not in here.value:
                break
            here = here.value[name]
        else:
            return here.where
    return node.where


def _build_scalar(node: _Node, kind: type, path: str) -> bool | int | float | str:
    text = node.value
    if not isinstance(text, str) or (node.is_null and kind is not str):
        raise _wrong(node, path, _NAMES[kind])
    if kind is str:
        if node.is_null:
            raise _wrong(node, path, 'text ("" if it is to be empty)')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _wrong(node, path, "text without surrogates")
        return text
    if node.is_plain and kind is bool and text in ("true", "false"):
        return text == "true"
    if node.is_plain and kind is int and _INTEGER.fullmatch(text) and len(text) <= 40 and abs(int(text)) < 2**63:
        return int(text)
    if node.is_plain and kind is float and _NUMBER.fullmatch(text) and len(text) <= 40 and math.isfinite(float(text)):
        return float(text)
    raise _wrong(node, path, _NAMES[kind])


_NAMES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _wrong(node: _Node, path: str, wanted: str) -> ConfigError:
    return ConfigError(f"{node.where}: {path or 'the file'} must be {wanted}, found {node.describe()}")
