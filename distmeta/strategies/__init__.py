"""How shards' meta-gradients become the next theta: one file or package per strategy.

A strategy is a class with the methods of `distmeta.runtime.strategy.Strategy`, named in `distmeta.config.catalog`.
"""
