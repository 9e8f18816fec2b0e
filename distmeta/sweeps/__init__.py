"""`distmeta sweep`: Ray Tune searches the space in a job's `sweep:` section."""


class NothingFoundError(RuntimeError):
    """No trial of a sweep reached an evaluation."""
