"""`distmeta sweep`: a job's `sweep:` section, searched by Ray Tune."""
