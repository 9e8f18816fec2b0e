"""`all-reduce`: workers form a group under Ray Train, all-reduce the meta-gradient and step a replicated optimizer.

driver_side.py   the strategy: what runs in the training process
group_host.py    the actor that the driver and the ranks meet at
ray_train.py     Ray Train's TorchTrainer, which makes the group
rank.py          what runs on each worker
messages.py      what they send to each other
"""
