"""The cluster that is asked about: `10Gbit`, `100us`, `lognormal:0.3`, `8,64,512` as a person writes them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from distmeta.config.parts import show_value
from distmeta.errors import InputError

NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
"""Bits a second, as `tc` writes them."""
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
LOCAL = "local"
"""The link between processes of one machine: its object store, at the cost that was measured."""
MOST_WORKERS = 10_000
"""Of one simulated cluster: more events than a person waits for."""
MOST_SERVERS = 256
STRATEGIES = ("driver", "sharded", "all-reduce", "async", "local")
"""By the names that `run.strategy` has for them, the exact ones first."""
WIDEST = 3.0
"""The largest σ of `lognormal`: at 3, one call in a thousand takes 10,000 times as long as the median."""


@dataclass(frozen=True)
class Link:
    """A network card's rate in each direction, both at once; None: no network, one machine's object store."""

    bytes_per_second: float | None

    @staticmethod
    def parse(text: str) -> Link:
        if text == LOCAL:
            return Link(None)
        found = re.fullmatch(rf"{NUMBER}({'|'.join(BITS)})(?:/s)?", text)
        rate = float(found[1]) * BITS[found[2]] / 8 if found else 0.0
        if not 0 < rate < math.inf:
            raise InputError(
                f"--link: got {show_value(text)}, expected a rate above 0 such as 10Gbit or 100Mbit, or {LOCAL}"
            )
        return Link(rate)

    def __str__(self) -> str:
        if self.bytes_per_second is None:
            return LOCAL
        bits = 8 * self.bytes_per_second
        unit = max((u for u in BITS if bits >= BITS[u]), key=BITS.__getitem__, default="bit")
        return f"{bits / BITS[unit]:.6f}".rstrip("0").rstrip(".") + unit  # as `parse` takes it: no exponent


def parse_latency(text: str) -> float:
    """`100us` -> 1e-4: the seconds that a message takes one way, however short."""
    found = re.fullmatch(rf"{NUMBER}({'|'.join(SECONDS)})", text)
    seconds = float(found[1]) * SECONDS[found[2]] if found else math.inf
    if not seconds < math.inf:
        raise InputError(
            f"--latency: got {show_value(text)}, expected a time such as 100us, 0.5ms or 0s (ns, us, ms, s)"
        )
    return seconds


@dataclass(frozen=True)
class Stragglers:
    """A shard takes exp(σ·z) times its usual time, z standard normal, drawn anew each time."""

    sigma: float = 0.0

    @staticmethod
    def parse(text: str) -> Stragglers:
        found = re.fullmatch(rf"lognormal:{NUMBER}", text)
        sigma = 0.0 if text == "none" else float(found[1]) if found else math.inf
        if not sigma <= WIDEST:
            raise InputError(
                f"--stragglers: got {show_value(text)}, expected none or lognormal:SIGMA with SIGMA from 0 to {WIDEST:g}, "
                "such as lognormal:0.3"
            )
        return Stragglers(sigma)

    def factor(self, random: Random) -> float:
        return random.lognormvariate(0.0, self.sigma) if self.sigma else 1.0

    def __str__(self) -> str:
        return f"lognormal:{self.sigma:g}" if self.sigma else "none"


def parse_workers(text: str) -> tuple[int, ...]:
    """`8,64` -> (8, 64), in rising order, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 1 <= int(part) <= MOST_WORKERS for part in parts):
        raise InputError(
            f"--workers: got {show_value(text)}, expected numbers from 1 to {MOST_WORKERS:,} with commas between them, "
            "such as 8,64,512"
        )
    return tuple(sorted({int(part) for part in parts}))


def parse_strategies(text: str | None) -> tuple[str, ...]:
    """`driver,local` -> ("driver", "local"), in the order of `STRATEGIES`; None: all."""
    parts = list(STRATEGIES) if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in STRATEGIES:
            raise InputError(f"--strategies: got {show_value(text)}, expected some of {','.join(STRATEGIES)}")
    return tuple(name for name in STRATEGIES if name in parts)


@dataclass(frozen=True)
class Cluster:
    """One cluster to simulate, and how the strategies are set on it."""

    workers: int
    link: Link
    latency: float = 0.0
    """Seconds of a message, one way."""
    per_node: int = 1
    """Workers that share a node's network card and its copy of theta."""
    stragglers: Stragglers = Stragglers()
    failures_per_hour: float = 0.0
    """Workers and servers lost in an hour, wherever."""
    servers: int = 2
    """Of `sharded`, each on a node of its own."""
    max_staleness: int = 2
    """Of `async`, in steps."""
    local_steps: int = 50
    """Of `local`: steps between two averages (H)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--workers-per-node", self.per_node, 1, MOST_WORKERS),
            ("--failures-per-hour", self.failures_per_hour, 0, 1e6),
            ("--servers", self.servers, 1, MOST_SERVERS),
            ("--max-staleness", self.max_staleness, 0, 1000),
            ("--local-steps", self.local_steps, 1, 100_000),
        ):
            if not least <= value <= most:  # nor NaN
                raise InputError(f"{option}: got {value}, expected a number from {least:g} to {most:g}")

    @property
    def nodes(self) -> int:
        return -(-self.workers // self.per_node)
