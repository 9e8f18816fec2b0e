"""The algorithms that come with distmeta: one literal table, short name -> "module:Class".

An algorithm is a class with the functions of `distmeta.core.Algorithm`. Its constructor gets the job's
`algorithm:` keys, and `model` and `score` where it accepts them.
"""

ALGORITHMS = {
    "maml": "distmeta.algorithms.maml:MAML",
    "reptile": "distmeta.algorithms.reptile:Reptile",
    "imaml": "distmeta.algorithms.imaml:IMAML",
}
