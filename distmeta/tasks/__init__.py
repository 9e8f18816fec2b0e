"""The task families that a job's `tasks: {type: …}` may name: name -> "module:callable"."""

TASKS = {
    "sinusoid": "distmeta.tasks.regression:Sinusoid",
    "linear": "distmeta.tasks.regression:Linear",
    "digits": "distmeta.tasks.digits:digits",
    "copy": "distmeta.tasks.copying:Copy",
    "navigation": "distmeta.tasks.navigation:Navigation",
    "bandit": "distmeta.tasks.bandit:Bandit",
    "gym": "distmeta.tasks.gym:Gym",
    "arrow": "distmeta.tasks.arrow:arrow",
}
