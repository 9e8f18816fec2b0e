"""`distmeta sweep`: a job's `sweep:` section, searched by Ray Tune."""


class NothingFoundError(RuntimeError):
    """No trial of a sweep came to an evaluation."""
