"""The Ray cluster that a run computes on: join or start one, its resources, and which of its nodes will go away."""

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

from distmeta.errors import InputError, first_line

CONNECT_SECONDS = 5.0
"""Longest wait for a cluster's head to accept a connection."""
REAPER_SECONDS = 10.0
"""Longest wait, at the end, for the process that cleans up after a local Ray."""
REFRESH_SECONDS = 2.0
"""Time between two queries about draining nodes. Each is a small request to the head."""


def import_ray(address: str | None) -> Any:
    """Import Ray and return the module.

    A local Ray that we start asks for a token, unless RAY_AUTH_MODE says otherwise. Ray reads that variable when it is
    imported, so a program that imports Ray earlier decides it.
    """
    if "ray" not in sys.modules and _cluster_address(address) is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # Ray's workers inherit it
    import ray

    return ray


def _cluster_address(address: str | None) -> str | None:
    """Return the address of the cluster to join, or None if a local one is to be started."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if not address or address == "local" else address


def connect(ray: Any, address: str | None, cpus: int) -> Callable[[], None]:
    """Join the named cluster, or start a local one. A Ray that this process has already joined is used as it is.

    Args:
        address: `run.address`; None: RAY_ADDRESS, else a local cluster.
        cpus: CPUs that the run needs. A local cluster offers that many even if the machine has fewer.

    Returns:
        A function that leaves the cluster, and stops it if it was started here.

    Raises:
        InputError: no cluster answers at the address, or it refuses.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns about its own default
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray.is_initialized():
        return lambda: None
    address = _cluster_address(address)
    if address is None:
        return _start_local(ray, cpus)
    _check_reachable(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(
            f"run.address: cannot join the Ray cluster at {address!r} ({first_line(error)}): is it running, "
            "and are RAY_AUTH_MODE and RAY_AUTH_TOKEN the cluster's?"
        ) from None
    return ray.shutdown


def _start_local(ray: Any, cpus: int) -> Callable[[], None]:
    """Start a Ray cluster on this machine. Return the function that stops it."""
    raylets_before = _child_raylets()
    with _loopback_only(ray):
        context = ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    session = os.path.realpath(context.address_info["session_dir"])
    reapers = [_start_reaper(raylet, session) for raylet in _child_raylets() - raylets_before]
    return partial(_stop_local, ray, reapers)


@contextlib.contextmanager
def _loopback_only(ray: Any) -> Iterator[None]:
    """Make a Ray that is started in this context listen on 127.0.0.1 only, as it does on macOS and Windows.

    Ray 2.60 has no public setting for this on Linux: `ray.init(_node_ip_address="127.0.0.1")` is replaced by the
    machine's address (`services.resolve_ip_for_localhost`). Ray's own processes read the environment variable; this
    process has read it already, hence the constant. Remove this when `ray.init(address="local")` binds to loopback.
    """
    variable = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    constants = ray._private.ray_constants
    constant_before = constants.ENABLE_RAY_CLUSTER
    variable_before = os.environ.get(variable)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[variable] = "0"
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = constant_before
        if variable_before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = variable_before


def _stop_local(ray: Any, reapers: list[subprocess.Popen[bytes]]) -> None:
    ray.shutdown()
    for reaper in reapers:
        assert reaper.stdin is not None
        reaper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            reaper.wait(REAPER_SECONDS)


def _start_reaper(raylet: int, session: str) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, however this one ends, and cleans up after Ray (see `reaper.py`)."""
    script = str(Path(__file__).with_name("reaper.py"))
    command = [sys.executable, "-S", "-E", script, str(raylet), session]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _child_raylets() -> set[int]:
    """Return the pids of this process's children that are raylets. On a system without /proc there are none."""
    found = set()
    for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                    found.add(int(pid))
    return found


def remove_orphaned_placement_groups(ray: Any, seconds: float = 0.0) -> int:
    """Remove this job's placement groups whose creator is dead, so that their resources are free again.

    Ray keeps such groups until the job ends. Ray Train's own cleaner (Ray 2.60) misses a group that was still starting
    when its controller died. The next controller would then find no room.

    Ray's public `placement_group_table()` does not say which actor created a group, so this reads the table as the head
    stores it. Remove this function when Ray Train removes such groups itself.

    Args:
        seconds: keep looking for so long, because the head may learn late that the creator is dead.

    Returns:
        The number of groups that were removed.
    """
    from ray._private.state import state
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    table_data: Any = import_module("ray.core.generated.gcs_pb2").PlacementGroupTableData
    removed_state = table_data.PlacementGroupState.Value("REMOVED")
    job_id = ray.get_runtime_context().get_job_id()
    removed: set[bytes] = set()
    deadline = time.monotonic() + seconds
    while True:
        for entry in state._connect_and_get_accessor().get_placement_group_table():
            group = table_data.FromString(entry)
            has_creating_actor = bool(group.creator_actor_id.strip(b"\xff"))  # a driver's group has none
            is_orphan = (
                has_creating_actor
                and group.creator_actor_dead
                and group.creator_job_id.hex() == job_id
                and not group.is_detached
            )
            is_removed = group.state == removed_state or group.placement_group_id in removed
            if is_orphan and not is_removed:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
                removed.add(group.placement_group_id)
        if time.monotonic() > deadline:
            return len(removed)
        time.sleep(0.2)


def describe_resources(ray: Any) -> str:
    """Return `the cluster has 8 CPU (2 free) and 0 GPU (0 free) on 2 nodes`."""
    try:
        total = ray.cluster_resources()
        free = ray.available_resources()
    except ray.exceptions.RpcError:
        return "the cluster's head does not answer"
    parts = [f"{total.get(key, 0):g} {key} ({free.get(key, 0):g} free)" for key in ("CPU", "GPU")]
    nodes = sum(bool(node["Alive"]) for node in ray.nodes())
    return f"the cluster has {' and '.join(parts)} on {nodes} node{'s' * (nodes != 1)}"


def can_autoscale(ray: Any) -> bool:
    """Return whether the cluster has an autoscaler that may add nodes.

    Ray 2.60 has no public way to ask; Ray Train asks in the same way. Replace it when `ray.autoscaler.sdk` can tell.
    """
    return bool(ray._private.state.state.get_max_resources_from_cluster_config())


class Nodes:
    """Which nodes are dead, and which will be taken away."""

    def __init__(self, ray: Any):
        self._ray = ray
        self._refreshed = -REFRESH_SECONDS
        self._draining: frozenset[str] = frozenset()

    def draining(self) -> frozenset[str]:
        """Return the ids of nodes that will be taken away: a spot instance, or as the autoscaler or a person decided.

        The answer is up to `REFRESH_SECONDS` old. In Ray 2.60 `ray.nodes()` does not show this, and `ray.util.state`
        needs a dashboard, which a local cluster does not have. Replace the private call when `ray.nodes()` shows it.
        """
        now = time.monotonic()
        if now - self._refreshed >= REFRESH_SECONDS:
            self._refreshed = now
            with contextlib.suppress(self._ray.exceptions.RpcError):  # the head restarts; ask again later
                self._draining = frozenset(self._ray._private.state.state.get_draining_nodes())
        return self._draining

    def is_dead(self, node_id: str | None) -> bool:
        """Return whether the cluster's head knows that a node is gone. None is a worker without a node."""
        if node_id is None:
            return False
        try:
            return all(node["NodeID"] != node_id or not node["Alive"] for node in self._ray.nodes())
        except self._ray.exceptions.RpcError:  # the head restarts
            return False


def _check_reachable(address: str) -> None:
    """Try to connect to HOST:PORT for a few seconds. Ray itself would try for minutes.

    Raises:
        InputError: nothing listens there.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" or another name that Ray understands
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"run.address: nothing answers at {address!r} ({error}), expected a Ray cluster's head"
        ) from None
