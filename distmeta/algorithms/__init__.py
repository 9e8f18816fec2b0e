"""The algorithms that come with distmeta: one literal table, short name -> "module:Class".

An algorithm is a class with the functions of `distmeta.protocols.Algorithm`. Its constructor gets the job's
`algorithm:` keys, and `model` and `score` where it accepts them.
"""

ALGORITHMS = {
    "maml": "distmeta.algorithms.maml:MAML",
    "reptile": "distmeta.algorithms.reptile:Reptile",
    "imaml": "distmeta.algorithms.imaml:IMAML",
    "maml-plus-plus": "distmeta.algorithms.maml_plus_plus:MAMLPlusPlus",
    "cavia": "distmeta.algorithms.cavia:CAVIA",
    "meta-sgd": "distmeta.algorithms.meta_sgd:MetaSGD",
    "meta-curvature": "distmeta.algorithms.meta_curvature:MetaCurvature",
    "gradient-norm": "distmeta.algorithms.gradient_norm:GradientNorm",
    "contrastive": "distmeta.algorithms.contrastive:Contrastive",
    "hypernet": "distmeta.algorithms.hypernet:Hypernet",
    "protonet": "distmeta.algorithms.protonet:ProtoNet",
    "matching": "distmeta.algorithms.matching:MatchingNet",
    "relation": "distmeta.algorithms.relation:RelationNet",
    "imp": "distmeta.algorithms.imp:IMP",
    "lstm": "distmeta.algorithms.lstm:LSTMLearner",
    "mann": "distmeta.algorithms.memory.mann:MANN",
    "maml-rl": "distmeta.algorithms.maml_rl:PolicyMAML",
    "rl2": "distmeta.algorithms.rl2:RL2",
    "snail": "distmeta.algorithms.snail:SNAIL",
}
