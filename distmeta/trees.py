"""Functions on pytrees: nested dicts, tuples and NamedTuples of tensors.

torch.func treats these containers alike, but torch (2.13) has the functions on them only in its private module
`torch.utils._pytree`. Everything else imports them from here. Use torch's public module here as soon as the oldest
torch that we allow has one (pytorch pull request 175082).
"""

from typing import Any

from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_map_only,
    tree_unflatten,
)

__all__ = [
    "name_leaves",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
    "tree_unflatten",
]


def name_leaves(tree: Any) -> list[tuple[str, Any]]:
    """Return the leaves with their names, as `x.mask` or `0.tokens`; "" for a tree that is one leaf."""
    return [(".".join(map(_name_key, path)), leaf) for path, leaf in tree_flatten_with_path(tree)[0]]


def _name_key(key: Any) -> str:
    if isinstance(key, MappingKey):
        return str(key.key)
    if isinstance(key, SequenceKey):
        return str(key.idx)
    return str(key.name) if isinstance(key, GetAttrKey) else str(key)
