"""A job file's text: YAML with 1.2's numbers, `key=value` overrides, and back again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from distmeta.errors import InputError

MOST_NODES = 100_000
"""Of a file with its aliases written out. A few lines of aliases of aliases stand for more than any memory holds."""


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree with `a.b=value` applied, values read as YAML."""
    result = _copy(tree)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"override: got {text!r}, expected key=value, such as run.workers=4")
        set_value(result, key, parse_yaml(value, f"override {key}"), f"override {key}")
    return result


def set_value(tree: dict[str, Any], key: str, value: Any, field: str) -> None:
    """Sets tree["a"]["b"] for the key a.b. Raises InputError, which names `field`, where a is not a section."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"{field}: {parent!r} is not a section")
    tree[last] = value


def get_value(tree: Mapping[str, Any], key: str) -> Any:
    """tree["a"]["b"] for the key a.b; None where there is none."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def find_line(text: str, key: str) -> int | None:
    """The line of a YAML text that a dotted key stands on, or the nearest key above it; None: not even that."""
    node, rest, line = yaml.compose(text, Loader=_Loader), key.split("."), None
    while rest and isinstance(node, yaml.MappingNode):
        for size in range(len(rest), 0, -1):  # a key may have dots of its own: sweep.space's do
            found = [pair for pair in node.value if pair[0].value == ".".join(rest[:size])]
            if found:
                line, node, rest = found[0][0].start_mark.line + 1, found[0][1], rest[size:]
                break
        else:
            break
    return line


def parse_yaml(text: str, source: str) -> Any:
    """The tree that a YAML text stands for.

    Raises:
        InputError: what is not YAML, or stands for an endless amount of it.
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if (nodes := _nodes(node, {})) > MOST_NODES:
                raise InputError(
                    f"{source}: {nodes:.0e} keys and values with its aliases written out, expected at most "
                    f"{MOST_NODES:,}"
                )
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source}: {where}not YAML: {getattr(error, 'problem', None) or error}") from None
    except InputError:
        raise
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # what PyYAML raises on a value that its tag or form does not fit: `!!int ""`, `!!bool maybe`, 2001-99-99
        raise InputError(f"{source}: not YAML: {error}") from None


def _nodes(node: yaml.Node, counted: dict[int, float]) -> float:
    """Nodes below and with this one, each alias counted as what it stands for; one in itself once: it is met later."""
    if id(node) not in counted:
        counted[id(node)] = 1.0
        parts = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        inner = parts if isinstance(node, yaml.CollectionNode) else []
        counted[id(node)] = 1.0 + sum(_nodes(part, counted) for part in inner)
    return counted[id(node)]


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """YAML that `parse_yaml` reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with 1.2's numbers (`1e-3` is one) and with duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _copy(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree
