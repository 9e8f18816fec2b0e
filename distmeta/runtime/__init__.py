"""The distributed training loop: driver, pool, worker, parameter server, failure policy, checkpoints."""
