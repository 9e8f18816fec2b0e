"""Ray Train's part in `all-reduce`: its TorchTrainer, and what it is told and tells."""

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

from distmeta.config.sections import RunSection
from distmeta.strategies.all_reduce.rank import serve

SIOCGIFADDR = 0x8915
"""Linux: the address of a network interface."""


class GroupFailureReporter(train.UserCallback):
    """Tells the host at once of what ended a group."""

    def __init__(self, host: Any):
        self._host = host

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self._host.lost.remote(reason_of(worker_exceptions))


class OnRaysNetwork(TorchConfig().backend_cls):  # type: ignore[misc]
    """gloo on the interface that Ray's nodes know each other by: its own choice, where the machine's name leads, is
    127.0.0.1 on many a machine."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(name_interface)
        super().on_start(worker_group, backend_config)


class InterfaceTorchConfig(TorchConfig):
    @property
    def backend_cls(self) -> Any:
        return OnRaysNetwork


def fit(host: Any, spec: list[Any], run: RunSection, per_rank: int) -> None:
    """A group of `run.workers` ranks, made anew whenever one is lost, until `serve` returns.

    Ray Train's own limit of failures is off: it counts over the whole run, distmeta's in a row. Nothing is reported to
    it, so its storage, in memory, is never written but for a marker.
    """
    least, most, gpus = run.min_workers, run.max_workers, run.gpus_per_worker
    whole = gpus >= 1 and float(gpus).is_integer()  # NCCL refuses ranks that share a GPU
    memory = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fsspec.filesystem("memory")))
    TorchTrainer(
        serve,
        train_loop_config={"host": host, "spec": spec},
        torch_config=InterfaceTorchConfig(
            "cpu:gloo,cuda:nccl" if whole else "gloo", timeout_s=1 + int(run.shard_timeout * per_rank)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": run.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=train.RunConfig(
            name="distmeta",
            storage_path="distmeta",
            storage_filesystem=memory,
            failure_config=train.FailureConfig(max_failures=-1),
            callbacks=[GroupFailureReporter(host)],
            logging_config=train.LoggingConfig(log_level="ERROR"),
        ),
    ).fit()


def reason_of(errors: Mapping[int, Exception]) -> str:
    """One line for what ended a group, from each rank's error: the death of one rather than what its peers raised."""
    for rank, error in errors.items():
        died = getattr(error, "health_check_failure", None)  # Ray Train's (2.60) wraps Ray's
        if died is not None:
            return f"rank {rank}: {type(died).__name__}"
    rank, error = next(iter(errors.items()))
    return f"rank {rank}: {str(error).strip().splitlines()[-1][:200]}"  # of a traceback


def name_interface() -> None:
    """On a rank, before gloo starts; what the machine's owner has set stays."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The network interface that has an IPv4 address; None: not found (or not Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
