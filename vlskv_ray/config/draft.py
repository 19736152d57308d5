"""A config file and overrides as plain values, each with the line it came from.

As in YAML 1.2, `1e-4` is a number and only true and false are booleans.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from vlskv_ray.config.options import source_from_text
from vlskv_ray.words import printable

KeyPath = tuple[str | int, ...]
"""Where a value stands: ("data", "sources", 0, "path")."""


class ConfigError(ValueError):
    """A run's configuration is wrong. `problems` holds one line for each thing to mend; `str()` is those lines."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


_MAX_BYTES = 1 << 20
_MAX_DEPTH = 20
_NO_ALIASES = "anchors (&) and aliases (*) are not read; write the value out, or put text that begins so in quotes"
_COMMAND_LINE = float("inf")  # as a line number: behind every line of the file
_CONSTANTS = {"": None, "~": None} | {
    spelling: value
    for word, value in {"null": None, "true": True, "false": False}.items()
    for spelling in (word, word.title(), word.upper())
}
_INT = re.compile(r"[-+]?[0-9]{1,100}")  # longer ones are read as floats: int() refuses to parse very long texts
FLOAT = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Composes nodes, which know their lines; refuses what a file of options never needs and an attack might use."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        problem = None
        if event.anchor:
            problem = _NO_ALIASES
        elif event.tag:
            problem = f"the tag {event.tag} is not read; remove it"
        elif self.depth == _MAX_DEPTH:
            problem = f"nested deeper than {_MAX_DEPTH} levels"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = _text(node)
    if node.style is not None:  # quoted
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if FLOAT.match(text) else text


def _text(node: yaml.ScalarNode) -> str:
    """The text of a node. JSON writes a character that takes two units of UTF-16 as both, as in "\\ud83d\\ude00"; half
    of one is no text that could be written to a file or a terminal."""
    text: str = node.value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    if any("\ud800" <= character <= "\udfff" for character in text):
        problem = f"{text!r} holds half of a character, a surrogate without its other half; write the whole one"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
    return text


@dataclass
class Draft:
    """Plain values on their way to a `Config`: where each came from, and what was found to say about it."""

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, float] = field(default_factory=dict)
    problems: list[tuple[float, str]] = field(default_factory=list)
    notices: list[tuple[float, str]] = field(default_factory=list)

    def problem(self, key: KeyPath, text: str) -> None:
        self.problems.append(self._located(key, text))

    def notice(self, key: KeyPath, text: str) -> None:
        self.notices.append(self._located(key, text))

    def _located(self, key: KeyPath, text: str) -> tuple[float, str]:
        known = (self.lines[key[:length]] for length in range(len(key), 0, -1) if key[:length] in self.lines)
        line = next(known, 0.0)
        file = printable(self.file)
        where = "command line" if line == _COMMAND_LINE else f"{file}:{line:.0f}" if line else file
        return line, f"{where}: {dotted(key)}: {text}"

    def read_file(self) -> None:
        """Fills the tree. A file that holds no keys raises ConfigError at once: nothing else can be said about it."""
        shown_file = printable(self.file)
        try:
            with open(self.file, "rb") as stream:
                content = stream.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError([f"{shown_file}: can not be read: {error.strerror}"]) from None
        if len(content) > _MAX_BYTES:
            raise ConfigError([f"{shown_file}: larger than {_MAX_BYTES >> 20} MiB; wanted a YAML file of options"])
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise ConfigError([f"{shown_file}:{line}: not UTF-8 text; save the file as UTF-8"]) from None
        try:
            node = yaml.compose(text, Loader=_Loader)
            tree = None if node is None else self._values(node, ())
        except yaml.YAMLError as error:
            line, problem = _syntax_problem(error, text)
            raise ConfigError([f"{shown_file}:{line}: {problem}"]) from None
        if tree is None:
            raise ConfigError([f"{shown_file}: is empty; wanted at least model.name_or_path and data.sources"])
        if not isinstance(tree, dict):
            raise ConfigError([f"{shown_file}:1: wanted keys such as `model:` at the top, got {shown(tree)}"])
        self.tree = tree

    def override(self, text: str) -> None:
        """Sets one value as `section.key=value` says."""
        name, equals, value = text.removeprefix("--").partition("=")
        if not (name and equals and name.isprintable()):
            self.problems.append(
                (_COMMAND_LINE, f"command line: wanted section.key=value or an option of --help, got {text!r}")
            )
            return
        try:
            node = yaml.compose(value, Loader=_Loader)
            if (place := self._open(name.split("."))) is not None:
                container, key = place
                for known in [known for known in self.lines if known[: len(key)] == key]:
                    del self.lines[known]
                self.lines[key] = _COMMAND_LINE
                container[key[-1]] = None if node is None else self._values(node, key, _COMMAND_LINE)
        except yaml.YAMLError as error:
            self.problems.append((_COMMAND_LINE, f"command line: {name}: {_syntax_problem(error, value)[1]}"))

    def take(self, *key: str) -> Any:
        """Removes and returns what stands at a key; None where there is nothing."""
        section: Any = self.tree
        for part in key[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        return section.pop(key[-1], None) if isinstance(section, dict) else None

    def take_section(self, key: str) -> dict[str, Any]:
        """The same for a section; anything else that stands there is a problem."""
        section = self.take(key)
        if section is not None and not isinstance(section, dict):
            self.problem((key,), f"wanted keys below it, got {shown(section)}")
        return section if isinstance(section, dict) else {}

    def rename(self, old: KeyPath, new: tuple[str, str], value: Any) -> None:
        """Gives a value that stood at `old` to `new`, unless that is given too."""
        section = self.tree.get(new[0]) or {}
        if isinstance(section, dict) and new[1] in section:
            self.notice(old, f"no effect here: {dotted(new)} is given as well")
        else:
            self.notice(old, f"read as {dotted(new)}")
            self.lines[new] = self.lines.get(old, 0.0)
            self.tree[new[0]] = section | {new[1]: value} if isinstance(section, dict) else section

    def _values(self, node: yaml.Node, key: KeyPath, line: float | None = None) -> Any:
        """The plain value of a node; notes the line of everything in it: its own, or `line` for all."""
        self.lines.setdefault(key, line or node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [self._values(item, (*key, index), line) for index, item in enumerate(node.value)]
        section: dict[str, Any] = {}
        for key_node, item in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            name = _text(key_node)
            child = (*key, name)
            if name in section:
                first, self.lines[child] = self.lines[child], line or key_node.start_mark.line + 1
                where = "" if line else f", first in line {first:.0f}"
                self.problem(child, f"given twice{where}; keep one of them")
                self.lines[child] = first  # whose value stays
            else:
                self.lines[child] = line or key_node.start_mark.line + 1
                section[name] = self._values(item, child, line)
        return section

    def _open(self, names: Sequence[str]) -> tuple[Any, KeyPath] | None:
        """The section or list that holds a value, made where there was none, and the value's key. None: a bad index."""
        here: Any = self.tree
        key: KeyPath = ()
        for depth, name in enumerate(names):
            part: str | int = name
            if isinstance(here, list):
                if name not in map(str, range(len(here) + 1)):
                    self.lines[(*key, name)] = _COMMAND_LINE
                    self.problem((*key, name), f"wanted an index from 0 to {len(here)}, {len(here)} to append")
                    return None
                part = int(name)
                here.extend([None] * (part == len(here)))
            key = (*key, part)
            if depth + 1 == len(names):
                break
            below = here.get(part) if isinstance(here, dict) else here[part]
            if key[:-1] == ("data", "sources") and isinstance(below, str):
                below = source_from_text(below)
            if not isinstance(below, dict | list):
                below = [] if names[depth + 1].isdecimal() else {}
                self.lines[key] = _COMMAND_LINE
            here[part] = below
            here = below
        return here, key


def _syntax_problem(error: yaml.YAMLError, text: str) -> tuple[int, str]:
    """Line and plain words of what PyYAML or `_Loader` could not read."""
    if isinstance(error, yaml.reader.ReaderError):
        character = text[error.position]
        return text.count("\n", 0, error.position) + 1, f"the character {character!r} is not allowed in YAML"
    assert isinstance(error, yaml.MarkedYAMLError) and error.problem_mark
    problem = str(error.problem)
    if r"'\t'" in problem:
        problem = "a tab; YAML is indented with spaces"
    elif str(error.context) in ("while scanning an alias", "while scanning an anchor"):
        problem = _NO_ALIASES
    elif "cannot start any token" in problem:
        problem = f"not valid YAML: {problem}; put text that begins so in quotes"
    elif error.context or type(error) is not yaml.MarkedYAMLError:
        problem = f"not valid YAML: {problem}"
    return error.problem_mark.line + 1, problem


def dotted(key: KeyPath) -> str:
    return ".".join(str(part) if str(part).isprintable() else repr(part) for part in key)


def shown(value: Any) -> str:
    """A value as the user wrote it, on one line."""
    if isinstance(value, dict):
        return "a section of keys"
    text = repr(value) if isinstance(value, str) else printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= 80 else f"{text[:77]}..."
