"""Fuzzing led by coverage, by hand (`pip install atheris`); what tests/test_fuzz.py has no idea of.

    python tests/atheris_fuzz.py job|overrides|store|episodes|checkpoint [-max_total_time=600] [libFuzzer's options]

Anything but a result or an InputError of one line ends it, with the input in `crash-…`; so does an input that takes
longer than 20 s.
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
    from test_fuzz import small_episodes, small_store

    import distmeta
    from distmeta.config.job import Job
    from distmeta.config.yaml_text import parse_yaml
    from distmeta.errors import InputError
    from distmeta.runtime import checkpoint as checkpoints
    from distmeta.tasks.fixed_episodes import read_episodes
    from distmeta.tasks.store import Store

Target = Callable[[bytes], object]


def job(folder: Path) -> tuple[bytes, Target]:
    seed = yaml.safe_dump(tree(run={"workers": {"min": 1, "max": 2}})).encode()
    return seed, lambda data: Job.parse(parse_yaml(data.decode(errors="replace"), "file"))


def overrides(folder: Path) -> tuple[bytes, Target]:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(tree()))
    seed = b"run.steps=3\0outer.schedule={type: cosine}\0run.workers={min: 1, max: 2}"
    return seed, lambda data: Job.load(path, data.decode(errors="replace").split("\0"))


def store(folder: Path) -> tuple[bytes, Target]:
    whole, path = small_store(folder), folder / "store.arrow"

    def check(data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        assert Store.open(str(path)).images.sum() >= 0

    return whole.read_bytes(), check


def episodes(folder: Path) -> tuple[bytes, Target]:
    whole, path = small_episodes(folder), folder / "episodes.parquet"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        for episode in read_episodes(str(path), (2,)):
            assert episode.support.x.isfinite().all()

    return whole.read_bytes(), check


def checkpoint(folder: Path) -> tuple[bytes, Target]:
    """A stranger's state.json and theta, with checksums that are right."""
    run = distmeta.train(Job.parse(tree("maml", run={"steps": 2, "name": "whole"}, output=str(folder)))).run
    path = checkpoints.find(run)
    theta = (path / "theta.safetensors").read_bytes()

    def check(data: bytes) -> None:
        text, _, tensors = data.partition(b"\0\0\0\0")
        try:
            state = json.loads(text)
            state["sha256"]["theta.safetensors"] = hashlib.sha256(tensors).hexdigest()
            text = json.dumps(state).encode()
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        (path / "state.json").write_bytes(text)
        (path / "theta.safetensors").write_bytes(tensors)
        distmeta.load(path, say=lambda said: None)

    return (path / "state.json").read_bytes() + b"\0\0\0\0" + theta, check


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    targets = {f.__name__: f for f in (job, overrides, store, episodes, checkpoint)}
    if name not in targets:
        sys.exit(f"usage: atheris_fuzz.py {'|'.join(targets)} [libFuzzer's options]")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seed, check = targets[name](folder)
        corpus = folder / "corpus"
        corpus.mkdir()
        (corpus / "seed").write_bytes(seed)

        def one(data: bytes) -> None:
            try:
                check(data)
            except InputError as error:
                if len(str(error).splitlines()) != 1:
                    raise

        options = ["-timeout=20", "-rss_limit_mb=4096", f"-max_len={max(4 * len(seed), 4096)}", *sys.argv[2:]]
        atheris.Setup([sys.argv[0], *options, str(corpus)], one)
        atheris.Fuzz()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
