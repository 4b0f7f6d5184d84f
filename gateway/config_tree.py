"""YAML text → plain values, and the line where each of them stands.

Rules: only mappings with text keys, lists, text, numbers, true/false and null; no tags, no merge keys. A key
that stands twice is a fault. Size, depth and the number of values *after* following aliases are bounded, so a
few lines of nested aliases cannot unfold into gigabytes. Dates stay text. Only plain values are constructed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from gateway.errors import ConfigError, Fault

MAX_FILE_BYTES: Final = 256 * 1024
MAX_VALUES: Final = 50_000
MAX_DEPTH: Final = 24

_PREFIX: Final = "tag:yaml.org,2002:"
_TEXT_TAGS: Final = ("str", "timestamp", "value")
_CONSTRUCTOR: Final = yaml.constructor.SafeConstructor()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value comes from. `key` replaces the dotted path in messages (an option or variable)."""

    file: str
    line: int
    key: str = ""


@dataclass(slots=True)
class Tree:
    """Plain values of one file; `places` holds the place of each path that is written in it."""

    file: str
    value: Any = None
    places: dict[tuple[str | int, ...], Place] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    faulty: set[tuple[str | int, ...]] = field(default_factory=set)
    """Paths whose value is already reported and not usable."""

    def place(self, path: tuple[str | int, ...]) -> Place:
        """The place of `path`, or of the nearest enclosing value that is written."""
        if path in self.places:
            return self.places[path]
        for end in range(len(path) - 1, -1, -1):
            if path[:end] in self.places:
                outer = self.places[path[:end]]
                return Place(outer.file, outer.line)
        return Place(self.file, 0)


def read_tree(path: Path) -> Tree:
    """Read and parse a YAML file.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, too large, or not YAML.
    """
    file = str(path)
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        hints = {FileNotFoundError: "check the path given with -c", IsADirectoryError: "name the file in it with -c"}
        hint = hints.get(type(error), "it must be readable")
        raise ConfigError([Fault(file, 0, "", f"{error.strerror}; {hint}")]) from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError([Fault(file, 0, "", f"the file is larger than {MAX_FILE_BYTES // 1024} KiB")])
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault(file, line, "", "this line is not UTF-8; save the file as UTF-8")]) from None
    return _compose(text, file)


def read_scalar(text: str) -> object:
    """The value of one YAML scalar, for variables of the environment; text that is nothing else stays text."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return _scalar(node) if isinstance(node, yaml.ScalarNode) else text
    except (yaml.YAMLError, ValueError):
        return text


def _compose(text: str, file: str) -> Tree:
    tree = Tree(file)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join((error.problem or error.context or "cannot be read").split())
        message = f"not valid YAML: {problem}; check indentation, quotes and colons here"
        raise ConfigError([Fault(file, mark.line + 1 if mark else 0, "", message)]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError([Fault(file, line, "", "holds a control character; remove it")]) from None
    except RecursionError:
        raise ConfigError([Fault(file, 0, "", f"nested deeper than {MAX_DEPTH} levels")]) from None
    if node is not None:
        tree.value = _Walk(tree).visit(node, ())
    return tree


class _Walk:
    """Visits nodes top down, following aliases; stops the whole walk when a bound is passed."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.visited = 0

    def fault(self, node: yaml.Node, path: tuple[str | int, ...], message: str) -> None:
        where = ".".join(map(str, path))
        self.tree.faults.append(Fault(self.tree.file, node.start_mark.line + 1, where, message))

    def visit(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        self.visited += 1
        line = node.start_mark.line + 1
        if self.visited > MAX_VALUES or len(path) > MAX_DEPTH:
            bound = f"more than {MAX_VALUES} values" if len(path) <= MAX_DEPTH else f"more than {MAX_DEPTH} levels"
            raise ConfigError([Fault(self.tree.file, line, "", f"holds {bound} once aliases are followed")])
        self.tree.places.setdefault(path, Place(self.tree.file, line))
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.visit(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.ScalarNode):
            raise TypeError(f"unknown YAML node {type(node).__name__}")
        try:
            return _scalar(node)
        except ValueError as error:
            self.fault(node, path, str(error))
            self.tree.faulty.add(path)
            return None

    def mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is None:
                self.fault(key_node, path, "a key must be plain text")
                continue
            inner = (*path, key)
            if key_node.tag == f"{_PREFIX}merge":
                self.fault(key_node, inner, "merge keys are not supported; put shared keys in `defaults`")
                continue
            if key in found:
                first = self.tree.places[inner].line
                self.fault(key_node, inner, f"stands twice, first on line {first}; keep one of them")
                continue
            self.tree.places[inner] = Place(self.tree.file, key_node.start_mark.line + 1)
            found[key] = self.visit(value_node, inner)
        return found


def _scalar(node: yaml.ScalarNode) -> object:
    """The value of a scalar node; ValueError for tags and numbers that are not accepted."""
    kind = node.tag.removeprefix(_PREFIX)
    if kind in _TEXT_TAGS:
        return str(node.value)
    if kind == "null":
        return None
    if kind == "bool":
        return bool(_CONSTRUCTOR.construct_yaml_bool(node))
    if kind == "int" and len(node.value) <= 64:
        return int(_CONSTRUCTOR.construct_yaml_int(node))
    if kind == "float" and len(node.value) <= 64:
        number = float(_CONSTRUCTOR.construct_yaml_float(node))
        if math.isfinite(number):
            return number
        raise ValueError(f"{node.value} is not a usable number; write a finite one")
    raise ValueError(f"the tag or value '{node.tag[:60]}' is not supported here; write plain text or a number")
