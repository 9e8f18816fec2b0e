"""Task families: distributions over tasks. `distmeta.config.catalog` lists the names that a job uses."""
