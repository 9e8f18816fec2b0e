"""The text of a job file: YAML with the numbers of YAML 1.2, `key=value` overrides, and back to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from distmeta.errors import InputError

MOST_NODES = 100_000
"""Keys and values of a file with its aliases written out. A few lines of nested aliases could stand for gigabytes."""


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of the tree with `a.b=value` applied. Values are read as YAML."""
    result = _copy_tree(tree)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"override: got {override!r}, expected key=value, such as run.workers=4")
        set_value(result, key, parse_yaml(value, f"override {key}"), f"override {key}")
    return result


def set_value(tree: dict[str, Any], key: str, value: Any, field: str) -> None:
    """Set tree["a"]["b"] for the key `a.b`. Raises InputError, which names `field`, if `a` is not a section."""
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise InputError(f"{field}: {parent!r} is not a section")
    tree[last] = value


def get_value(tree: Mapping[str, Any], key: str) -> Any:
    """Return tree["a"]["b"] for the key `a.b`, or None if it is missing."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def find_line(text: str, key: str) -> int | None:
    """Return the line of a dotted key in a YAML text, or that of the nearest key above it; None if there is none."""
    node = yaml.compose(text, Loader=_Loader)
    rest = key.split(".")
    line = None
    while rest and isinstance(node, yaml.MappingNode):
        entry = _find_longest_key(node, rest)
        if entry is None:
            break
        key_node, node, rest = entry
        line = key_node.start_mark.line + 1
    return line


def _find_longest_key(
    node: yaml.MappingNode, parts: list[str]
) -> tuple[yaml.Node, yaml.Node, list[str]] | None:
    """Return the nodes of the longest prefix of `parts`, and the rest. Keys of `sweep.space` contain dots."""
    for size in range(len(parts), 0, -1):
        for key_node, value_node in node.value:
            if key_node.value == ".".join(parts[:size]):
                return key_node, value_node, parts[size:]
    return None


def parse_yaml(text: str, source: str) -> Any:
    """Return the tree that a YAML text stands for.

    Args:
        source: the file or override, for messages.

    Raises:
        InputError: the text is not YAML, or its aliases stand for too much.
    """
    try:
        return _load_document(_Loader(text), source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source}: {place}not YAML: {error.problem or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{source}: not YAML: {error}") from None
    except InputError:
        raise
    except (ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError) as error:
        # PyYAML raises these if a value does not fit its tag or form: `!!int ""`, `!!bool maybe`, 2001-99-99
        raise InputError(f"{source}: not YAML: {error}") from None


def _load_document(loader: _Loader, source: str) -> Any:
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        nodes = _count_nodes(node, {})
        if nodes > MOST_NODES:
            raise InputError(
                f"{source}: {nodes:.0e} keys and values with its aliases written out, expected at most {MOST_NODES:,}"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count_nodes(node: yaml.Node, counted: dict[int, float]) -> float:
    """Return the number of nodes from this one down, with every alias counted as what it stands for.

    An alias inside itself counts once; such a tree is refused later.
    """
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = 1.0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [child for pair in node.value for child in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    counted[id(node)] = 1.0 + sum(_count_nodes(child, counted) for child in children)
    return counted[id(node)]


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return YAML that `parse_yaml` reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads YAML with the numbers of YAML 1.2 (`1e-3` is one) and refuses duplicate keys."""

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
    """Quotes the strings that `_Loader` would read as numbers."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )


def _copy_tree(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _copy_tree(value) for key, value in tree.items()}
    return [_copy_tree(value) for value in tree] if isinstance(tree, list) else tree
