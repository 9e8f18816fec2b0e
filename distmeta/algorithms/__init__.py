"""Meta-learners: one paper per file. `distmeta.config.catalog` lists the names that a job uses."""
