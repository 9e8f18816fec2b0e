"""Functions on pytrees: nested dicts, tuples and NamedTuples of tensors.

torch.func treats these containers alike, but torch (2.13) has the functions on them only in its private module
`torch.utils._pytree`. Everything else imports them from here. Use torch's public module here as soon as the oldest
torch that we allow has one (pytorch pull request 175082).
"""

from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_leaves", "tree_map", "tree_map_only", "tree_unflatten"]
