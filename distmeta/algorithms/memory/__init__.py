"""Memory-augmented networks: `mann` is the algorithm, `lrua`, `ntm` and `dnc` are its memories."""
