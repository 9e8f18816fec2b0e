"""The parts that come with distmeta, by the short name that a job uses for them.

A job names a part as `type: maml` (a line of these tables) or `type: package.module:Name` (a user's own). A new part of
ours is one file and one line here; a user's part needs no line.
"""

MODELS = {
    "mlp": "distmeta.models.mlp:MLP",
    "conv4": "distmeta.models.conv4:Conv4",
    "resnet12": "distmeta.models.resnet12:ResNet12",
    "gaussian": "distmeta.models.policy:Gaussian",
    "hf": "distmeta.models.hf:HuggingFace",
    "timm": "distmeta.models.timm:timm",
}
"""A model is a `torch.nn.Module`. Its constructor also receives `in_shape` and `out_features` if it accepts them."""

TASKS = {
    "sinusoid": "distmeta.tasks.regression:Sinusoid",
    "linear": "distmeta.tasks.regression:Linear",
    "digits": "distmeta.tasks.digits:digits",
    "noisy-digits": "distmeta.tasks.noisy_digits:NoisyDigits",
    "copy": "distmeta.tasks.copying:Copy",
    "navigation": "distmeta.tasks.navigation:Navigation",
    "bandit": "distmeta.tasks.bandit:Bandit",
    "gym": "distmeta.tasks.gym:Gym",
    "arrow": "distmeta.tasks.arrow:arrow",
    "texts": "distmeta.tasks.texts:Texts",
}
"""A task family is described by `distmeta.protocols.TaskFamily`."""

ALGORITHMS = {
    "maml": "distmeta.algorithms.maml:MAML",
    "reptile": "distmeta.algorithms.reptile:Reptile",
    "imaml": "distmeta.algorithms.imaml:IMAML",
    "maml-plus-plus": "distmeta.algorithms.maml_plus_plus:MAMLPlusPlus",
    "cavia": "distmeta.algorithms.cavia:CAVIA",
    "meta-sgd": "distmeta.algorithms.meta_sgd:MetaSGD",
    "meta-curvature": "distmeta.algorithms.meta_curvature:MetaCurvature",
    "bilevel": "distmeta.algorithms.bilevel:Bilevel",
    "gradient-norm": "distmeta.algorithms.gradient_norm:GradientNorm",
    "contrastive": "distmeta.algorithms.contrastive:Contrastive",
    "hypernet": "distmeta.algorithms.hypernet:Hypernet",
    "protonet": "distmeta.algorithms.protonet:ProtoNet",
    "matching": "distmeta.algorithms.matching:MatchingNet",
    "relation": "distmeta.algorithms.relation:RelationNet",
    "imp": "distmeta.algorithms.imp:IMP",
    "lstm": "distmeta.algorithms.lstm:LSTMMetaLearner",
    "mann": "distmeta.algorithms.memory.mann:MANN",
    "maml-rl": "distmeta.algorithms.maml_rl:PolicyMAML",
    "rl2": "distmeta.algorithms.rl2:RL2",
    "snail": "distmeta.algorithms.snail:SNAIL",
}
"""An algorithm is described by `distmeta.protocols.Algorithm`. It also receives `model` and `score`."""

STRATEGIES = {
    "driver": "distmeta.strategies.driver:Driver",
    "sharded": "distmeta.strategies.sharded:Sharded",
    "all-reduce": "distmeta.strategies.all_reduce.driver_side:AllReduce",
    "async": "distmeta.strategies.asynchronous:Async",
    "local": "distmeta.strategies.local:Local",
}
"""How meta-gradients are combined; described by `distmeta.runtime.strategy.Strategy`."""

TRACKERS = {
    "mlflow": "distmeta.tracking.mlflow:MlflowTracker",
    "tensorboard": "distmeta.tracking.tensorboard:TensorBoardTracker",
    "wandb": "distmeta.tracking.wandb:WandbTracker",
    "none": "distmeta.tracking.none:NoTracker",
}
"""Where a run's history is sent besides its folder; described by `distmeta.tracking.interface.Tracker`."""
