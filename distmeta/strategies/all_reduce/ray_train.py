"""Ray Train's part in `all-reduce`: its TorchTrainer and how it is set up."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from typing import Any

import fsspec
import pyarrow.fs
import ray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer

# Ray 2.60 does not export the class that wraps the death of a worker, and its text leaves out the type of the error.
# Import it from ray.train when it is public.
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from distmeta.config.sections import RunSection
from distmeta.strategies.all_reduce.rank import run_rank

SIOCGIFADDR = 0x8915
"""Linux: request for the address of a network interface."""


class GroupFailureReporter(train.UserCallback):
    """Tells the host at once what ended a group."""

    def __init__(self, host: Any):
        self._host = host

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._host.report_loss.remote(describe_failure(worker_exceptions))


class InterfaceBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    """Makes gloo use the network interface by which Ray's nodes know each other.

    gloo itself uses the interface that the machine's name resolves to, which on many machines is 127.0.0.1.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(set_gloo_interface)
        super().on_start(worker_group, backend_config)


class InterfaceTorchConfig(TorchConfig):
    """A TorchConfig with `InterfaceBackend`."""

    @property
    def backend_cls(self) -> Any:
        return InterfaceBackend


def run_trainer(host: Any, spec: list[Any], run: RunSection, shards_per_rank: int) -> None:
    """Run a group of `run.workers` ranks until they were told to leave. Ray Train replaces a group that is lost.

    Ray Train's own limit of failures is off, because it counts over the whole run and distmeta counts in a row. Nothing
    is reported to Ray Train, so its storage, which is in memory, only holds a marker.

    Args:
        host: the `GroupHost` actor.
        spec: a reference to the `WorkerSpec`, in a list.
        shards_per_rank: the most shards that one rank computes in a step.
    """
    gpus = run.gpus_per_worker
    uses_nccl = gpus >= 1 and float(gpus).is_integer()  # NCCL refuses ranks that share a GPU
    resources = {"CPU": run.cpus_per_worker}
    if gpus:
        resources["GPU"] = gpus
    workers: Any = run.min_workers
    if run.min_workers != run.max_workers:
        workers = (run.min_workers, run.max_workers)
    trainer = TorchTrainer(
        run_rank,
        train_loop_config={"host": host, "spec": spec},
        torch_config=InterfaceTorchConfig(
            "cpu:gloo,cuda:nccl" if uses_nccl else "gloo",
            timeout_s=1 + int(run.shard_timeout * shards_per_rank),
        ),
        scaling_config=train.ScalingConfig(
            num_workers=workers, use_gpu=gpus > 0, resources_per_worker=resources
        ),
        run_config=train.RunConfig(
            name="distmeta",
            storage_path="distmeta",
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("memory"))),
            failure_config=train.FailureConfig(max_failures=-1),
            callbacks=[GroupFailureReporter(host)],
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    )
    trainer.fit()


def describe_failure(errors: Mapping[int, Exception]) -> str:
    """Return one line about what ended a group, from each rank's error.

    The death of a rank is preferred to what the other ranks raised because of it.
    """
    for rank, error in errors.items():
        if isinstance(error, WorkerHealthCheckFailedError):
            return f"rank {rank}: {type(error.health_check_failure).__name__}"
    rank, error = next(iter(errors.items()))
    last_line_of_traceback = str(error).strip().splitlines()[-1]
    return f"rank {rank}: {last_line_of_traceback[:200]}"


def set_gloo_interface() -> None:
    """Tell gloo which network interface to use, on a rank before it starts. A variable that is already set stays."""
    name = find_interface(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def find_interface(address: str) -> str | None:
    """Return the network interface that has an IPv4 address, or None if there is none (or this is not Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return None
