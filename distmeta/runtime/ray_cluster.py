"""The Ray cluster a run computes on: joined or started, its resources, and which of its nodes are going away."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from distmeta.errors import InputError

CONNECT_SECONDS = 5.0
"""Longest wait for a cluster's head to answer at all."""
REAPER_SECONDS = 10.0
"""Longest wait, at the end, for the process that clears up after a local Ray."""
LOOK_SECONDS = 2.0
"""Between two looks at the nodes: one small question to the head."""


def import_ray(address: str | None) -> Any:
    """Ray's module. A Ray of this run's own will ask for a token, unless RAY_AUTH_MODE says otherwise: Ray reads the
    mode when it is imported, so that a program that did so before decides it.
    """
    if "ray" not in sys.modules and _named(address) is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # its workers inherit it
    import ray

    return ray


def _named(address: str | None) -> str | None:
    """The cluster to join; None: a local one is started."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if not address or address == "local" else address


def connect(ray: Any, address: str | None, cpus: int) -> Callable[[], None]:
    """Joins the cluster that is named or running, else starts a local one; what leaves it again.

    Raises:
        InputError: no cluster answers at the address, or it refuses.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return lambda: None
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = _named(address)
    if address is None:
        before = _raylets()
        cpus = max(os.cpu_count() or 1, cpus)
        with _on_loopback(ray):
            context = ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        session = os.path.realpath(context.address_info["session_dir"])
        return partial(_shut_down, ray, [_reaper(raylet, session) for raylet in _raylets() - before])
    _check_reachable(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"run.address: cannot join the Ray cluster at {address!r} ({str(error).splitlines()[0]}): is it running, "
            "and are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?"
        ) from None
    return ray.shutdown


@contextlib.contextmanager
def _on_loopback(ray: Any) -> Iterator[None]:
    """What Ray starts in here listens on this machine alone, as it does on macOS and Windows."""
    # not in Ray's public interface (2.60) for Linux; its processes read the variable, this one has read it
    name, constants = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray._private.ray_constants
    before, variable = constants.ENABLE_RAY_CLUSTER, os.environ.get(name)
    constants.ENABLE_RAY_CLUSTER, os.environ[name] = False, "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        if variable is None:
            del os.environ[name]
        else:
            os.environ[name] = variable


def _shut_down(ray: Any, reapers: list[subprocess.Popen[bytes]]) -> None:
    ray.shutdown()
    for reaper in reapers:
        assert reaper.stdin is not None
        reaper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            reaper.wait(REAPER_SECONDS)


def _reaper(raylet: int, session: str) -> subprocess.Popen[bytes]:
    """A process in a session of its own that outlives this one, however this one ends, and cleans up after it."""
    words = [sys.executable, "-S", "-E", str(Path(__file__).with_name("reaper.py")), str(raylet), session]
    return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)


def _raylets() -> set[int]:
    """Children of this process that are raylets; none where there is no /proc."""
    found = set()
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                    found.add(int(pid))
    return found


def free_orphans(ray: Any, seconds: float = 0.0) -> int:
    """Removes the placement groups of this job whose creator is dead, looking for so long; how many there were.

    Ray keeps them until the job ends. Ray Train's own cleaner (2.60) does not know of a group that was still starting
    when its controller died: the next one would find no room.
    """
    from ray._private.state import state  # the public table does not tell whose a group is
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    data: Any = import_module("ray.core.generated.gcs_pb2").PlacementGroupTableData
    own, freed = ray.get_runtime_context().get_job_id(), set[bytes]()
    deadline = time.monotonic() + seconds
    while True:
        for line in state._connect_and_get_accessor().get_placement_group_table():
            found = data.FromString(line)
            removed = found.state == data.PlacementGroupState.Value("REMOVED")
            actor = found.creator_actor_id.strip(b"\xff")  # none: a driver's own, such as a trial's
            orphan = (
                actor
                and found.creator_actor_dead
                and found.creator_job_id.hex() == own
                and not found.is_detached
            )
            if orphan and not removed and found.placement_group_id not in freed:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(found.placement_group_id)))
                freed.add(found.placement_group_id)
        if time.monotonic() > deadline:
            return len(freed)
        time.sleep(0.2)


def resources(ray: Any) -> str:
    """What the cluster has, in words."""
    try:
        have, free = ray.cluster_resources(), ray.available_resources()
    except ray.exceptions.RpcError:
        return "the cluster's head does not answer"
    parts = [f"{have.get(key, 0):g} {key} ({free.get(key, 0):g} free)" for key in ("CPU", "GPU")]
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return f"the cluster has {' and '.join(parts)} on {nodes} node{'s' * (nodes != 1)}"


def autoscales(ray: Any) -> bool:
    """Whether nodes may come that are not there yet."""
    # not in Ray's public interface (2.60); Ray Data asks the same way
    return bool(ray._private.state.state.get_max_resources_from_cluster_config())


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
            with contextlib.suppress(self._ray.exceptions.RpcError):  # a head that restarts: asked again
                self._draining = frozenset(self._ray._private.state.state.get_draining_nodes())
        return self._draining

    def died(self, node: str | None) -> bool:
        """Whether a node is gone, as far as the cluster's head knows."""
        try:
            return node is not None and all(n["NodeID"] != node or not n["Alive"] for n in self._ray.nodes())
        except self._ray.exceptions.RpcError:  # a head that restarts
            return False


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
