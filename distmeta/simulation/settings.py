"""The settings of a simulation, read from what a person writes: `10Gbit`, `100us`, `lognormal:0.3`, `8,64,512`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from random import Random

from distmeta.config.parts import show_value
from distmeta.errors import InputError

NUMBER = r"(\d+(?:\.\d+)?|\.\d+)"
BITS = {"bit": 1.0, "kbit": 1e3, "Mbit": 1e6, "Gbit": 1e9, "Tbit": 1e12}
"""Bits per second, by the units of `tc`."""
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
LOCAL = "local"
"""The link between processes of one machine: its object store, at the measured cost."""
MAX_WORKERS = 10_000
"""More workers would take too long to simulate."""
MAX_SERVERS = 256
MAX_SIGMA = 3.0
"""Largest σ of `lognormal`. At 3, one call in a thousand takes 10,000 times as long as the median."""
STRATEGIES = ("driver", "sharded", "all-reduce", "async", "local")
"""The strategies that can be simulated, by their `strategy.type`. Those with the driver's steps come first."""


@dataclass(frozen=True)
class Link:
    """A network card's rate, which each direction has at the same time."""

    bytes_per_second: float | None
    """None if there is no network, only one machine's object store."""

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
        """Return the rate as `parse` accepts it, without an exponent."""
        if self.bytes_per_second is None:
            return LOCAL
        bits = 8 * self.bytes_per_second
        units = [unit for unit in BITS if bits >= BITS[unit]] or ["bit"]
        unit = max(units, key=BITS.__getitem__)
        return f"{bits / BITS[unit]:.6f}".rstrip("0").rstrip(".") + unit


def parse_latency(text: str) -> float:
    """Return the seconds that a message takes one way, however short it is: `100us` -> 1e-4."""
    found = re.fullmatch(rf"{NUMBER}({'|'.join(SECONDS)})", text)
    seconds = float(found[1]) * SECONDS[found[2]] if found else math.inf
    if not seconds < math.inf:
        raise InputError(
            f"--latency: got {show_value(text)}, expected a time such as 100us, 0.5ms or 0s (ns, us, ms, s)"
        )
    return seconds


@dataclass(frozen=True)
class Stragglers:
    """A shard takes exp(σ·z) times its usual time, with z from a standard normal for each shard."""

    sigma: float = 0.0

    @staticmethod
    def parse(text: str) -> Stragglers:
        if text == "none":
            return Stragglers()
        found = re.fullmatch(rf"lognormal:{NUMBER}", text)
        sigma = float(found[1]) if found else math.inf
        if not sigma <= MAX_SIGMA:
            raise InputError(
                f"--stragglers: got {show_value(text)}, expected none or lognormal:SIGMA with SIGMA from 0 to "
                f"{MAX_SIGMA:g}, such as lognormal:0.3"
            )
        return Stragglers(sigma)

    def draw_factor(self, random: Random) -> float:
        return random.lognormvariate(0.0, self.sigma) if self.sigma else 1.0

    def __str__(self) -> str:
        return f"lognormal:{self.sigma:g}" if self.sigma else "none"


def parse_workers(text: str) -> tuple[int, ...]:
    """Return numbers of workers in rising order, each once: `8,64` -> (8, 64)."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and 1 <= int(part) <= MAX_WORKERS for part in parts):
        raise InputError(
            f"--workers: got {show_value(text)}, expected numbers from 1 to {MAX_WORKERS:,} with commas between them, "
            "such as 8,64,512"
        )
    return tuple(sorted({int(part) for part in parts}))


def parse_strategies(text: str | None) -> tuple[str, ...]:
    """Return strategies in the order of `STRATEGIES`; None means all: `local,driver` -> ("driver", "local")."""
    parts = list(STRATEGIES) if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in STRATEGIES:
            raise InputError(f"--strategies: got {show_value(text)}, expected some of {','.join(STRATEGIES)}")
    return tuple(name for name in STRATEGIES if name in parts)


@dataclass(frozen=True)
class ClusterSettings:
    """One cluster to simulate, and the options of the strategies on it."""

    workers: int
    link: Link
    latency: float = 0.0
    """Seconds of a message, one way."""
    workers_per_node: int = 1
    """Workers that share a node's network card and its copy of theta."""
    stragglers: Stragglers = Stragglers()
    failures_per_hour: float = 0.0
    """Workers and servers lost per hour in the whole cluster."""
    servers: int = 2
    """Servers of `sharded`, each on its own node."""
    max_staleness: int = 2
    """Of `async`, in steps."""
    local_steps: int = 50
    """Of `local`: steps between two averages (H)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--workers-per-node", self.workers_per_node, 1, MAX_WORKERS),
            ("--failures-per-hour", self.failures_per_hour, 0, 1e6),
            ("--servers", self.servers, 1, MAX_SERVERS),
            ("--max-staleness", self.max_staleness, 0, 1000),
            ("--local-steps", self.local_steps, 1, 100_000),
        ):
            if not least <= value <= most:  # also refuses NaN
                raise InputError(f"{option}: got {value}, expected a number from {least:g} to {most:g}")

    @property
    def nodes(self) -> int:
        return math.ceil(self.workers / self.workers_per_node)
