"""How one shard is computed: who owns the task axis, the unrolling and the numerics."""
