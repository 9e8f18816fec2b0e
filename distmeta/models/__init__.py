"""Networks, and the wrapper that makes a module a pure function. `distmeta.config.catalog` lists their names."""
