"""The Ray cluster a run computes on: joined or started, its resources, and which of its nodes are going away."""

from __future__ import annotations

import logging
import os
import socket
import time
from typing import Any

from distmeta.core import InputError

CONNECT_SECONDS = 5.0
"""Longest wait for a cluster's head to answer at all."""
LOOK_SECONDS = 2.0
"""Between two looks at the nodes: one small question to the head."""


def connect(ray: Any, address: str | None, cpus: int) -> bool:
    """Joins the cluster that is named or running, else starts a local one; whether this call started Ray here."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return False
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = address or os.environ.get("RAY_ADDRESS")
    if not address or address == "local":
        ray.init(address="local", num_cpus=max(os.cpu_count() or 1, cpus), include_dashboard=False, **quiet)
        return True
    _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"run.address: cannot join the Ray cluster at {address!r} ({str(error).splitlines()[0]}): is it running, "
            "and are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?"
        ) from None
    return True


def resources(ray: Any) -> str:
    """What the cluster has, in words."""
    have, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{have.get(key, 0):g} {key} ({free.get(key, 0):g} free)" for key in ("CPU", "GPU")]
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return f"the cluster has {' and '.join(parts)} on {nodes} node{'s' * (nodes != 1)}"


class Nodes:
    """Which nodes are alive, and which were told to go; looked up at most every LOOK_SECONDS."""

    def __init__(self, ray: Any):
        self._ray = ray
        self._looked = -LOOK_SECONDS
        self._draining: frozenset[str] = frozenset()

    def draining(self) -> frozenset[str]:
        """Ids of nodes that will be taken away: a spot instance's notice, an autoscaler's decision, a person's."""
        now = time.monotonic()
        if now - self._looked >= LOOK_SECONDS:
            self._looked = now
            # not in Ray's public interface (2.60); Ray Train asks the same way
            self._draining = frozenset(self._ray._private.state.state.get_draining_nodes())
        return self._draining

    def died(self, node: str | None) -> bool:
        """Whether a node is gone, as far as the cluster's head knows."""
        return node is not None and all(n["NodeID"] != node or not n["Alive"] for n in self._ray.nodes())


def _check_reachable(address: str) -> None:
    """Tries HOST:PORT for a few seconds: Ray itself tries for minutes.

    Raises:
        InputError: nothing listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # auto, or another of Ray's own names
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"run.address: nothing answers at {address!r} ({error}), expected a Ray cluster's head"
        ) from None
