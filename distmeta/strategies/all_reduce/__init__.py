"""Workers form a group and all-reduce the meta-gradient."""
