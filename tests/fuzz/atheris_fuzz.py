"""Fuzzing guided by coverage, started by hand (`pip install atheris`). It finds what test_fuzz.py does not think of.

    PYTHONPATH=tests python tests/fuzz/atheris_fuzz.py job|overrides|store|episodes|checkpoint [libFuzzer's options]

For example with `-max_total_time=600`. It ends, with the input in `crash-…`, if an input gives anything but a result or
an InputError of one line, or takes longer than 20 s.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import yaml
from conftest import tree

with atheris.instrument_imports(include=["distmeta", "yaml", "pydantic"]):
    from support.small_files import write_small_episodes, write_small_store

    import distmeta
    from distmeta.config.job import Job
    from distmeta.config.yaml_text import parse_yaml
    from distmeta.errors import InputError
    from distmeta.runtime import checkpoint as checkpoints
    from distmeta.tasks.fixed_episodes import read_episodes
    from distmeta.tasks.store import TaskStore

Target = tuple[bytes, Callable[[bytes], object]]
"""A valid input to begin with, and the function that reads an input."""
SEPARATOR = b"\0\0\0\0"
"""Between the two files of a checkpoint."""


def fuzz_job(folder: Path) -> Target:
    seed = yaml.safe_dump(tree(run={"workers": {"min": 1, "max": 2}})).encode()
    return seed, lambda data: Job.parse(parse_yaml(data.decode(errors="replace"), "file"))


def fuzz_overrides(folder: Path) -> Target:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree()))
    seed = b"run.steps=3\0outer.schedule={type: cosine}\0run.workers={min: 1, max: 2}"
    return seed, lambda data: Job.load(path, data.decode(errors="replace").split("\0"))


def fuzz_store(folder: Path) -> Target:
    path = folder / "store.arrow"

    def check(data: bytes) -> None:
        path.unlink(missing_ok=True)  # the last one may still be mapped
        path.write_bytes(data)
        assert TaskStore.open(str(path)).images.sum() >= 0

    return write_small_store(folder).read_bytes(), check


def fuzz_episodes(folder: Path) -> Target:
    path = folder / "episodes.parquet"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for episode in read_episodes(str(path), (2,)):
            assert episode.support.x.isfinite().all()

    return write_small_episodes(folder).read_bytes(), check


def fuzz_checkpoint(folder: Path) -> Target:
    """Forge state.json and theta, with the right checksums."""
    job = tree("maml", run={"steps": 2, "name": "whole"}, output=str(folder))
    path = checkpoints.find(distmeta.train(Job.parse(job)).run)

    def check(data: bytes) -> None:
        text, _, theta = data.partition(SEPARATOR)
        try:
            state = json.loads(text)
            state["sha256"]["theta.safetensors"] = hashlib.sha256(theta).hexdigest()
            text = json.dumps(state).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        (path / "state.json").write_bytes(text)
        (path / "theta.safetensors").write_bytes(theta)
        distmeta.load(path, report=lambda line: None)

    seed = (path / "state.json").read_bytes() + SEPARATOR + (path / "theta.safetensors").read_bytes()
    return seed, check


TARGETS = {
    "job": fuzz_job,
    "overrides": fuzz_overrides,
    "store": fuzz_store,
    "episodes": fuzz_episodes,
    "checkpoint": fuzz_checkpoint,
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: atheris_fuzz.py {'|'.join(TARGETS)} [libFuzzer's options]")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seed, check = TARGETS[name](folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed)

        def check_one(data: bytes) -> None:
            try:
                check(data)
            except InputError as error:
                if len(str(error).splitlines()) != 1:
                    raise

        longest = max(4 * len(seed), 4096)
        options = ["-timeout=20", "-rss_limit_mb=4096", f"-max_len={longest}", *sys.argv[2:]]
        atheris.Setup([sys.argv[0], *options, str(corpus)], check_one)
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
