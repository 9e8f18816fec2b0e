"""Memory-augmented networks."""
