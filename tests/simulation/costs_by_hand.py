"""Costs that no machine has, to compare the simulation with formulas."""

from __future__ import annotations

from distmeta.simulation.costs import CostCurve, JobCosts, MachineCosts

MACHINE = MachineCosts(
    call=2e-3,
    call_driver=4e-4,
    message=8e-4,
    message_driver=1e-4,
    step=1e-3,
    put=CostCurve(((0.0, 1e-4), (4e6, 2e-3))),
    receive=CostCurve(((0.0, 0.0), (4e6, 1e-3))),
    reply=CostCurve(((0.0, 2e-4), (4e6, 3e-3))),
    reply_shared=0.0,
    add=CostCurve(((0.0, 1e-5), (4e6, 8e-4))),
    ring=CostCurve(((0.0, 1e-3), (4e6, 6e-3))),
    slowdown=(1.0, 1.25),
    cores=2,
    start=6.0,
)
JOB = JobCosts(parameters=1_000_000, shards=8, shard=2e-3, task=5e-3, outer=4e-3)
