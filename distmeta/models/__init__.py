"""The models that come with distmeta: one literal table, short name -> "module:Class".

A model is an ordinary `torch.nn.Module`. Its constructor gets the job's `model:` keys, and `in_shape` and
`out_features` where it accepts them.
"""

MODELS = {
    "mlp": "distmeta.models.mlp:MLP",
    "conv4": "distmeta.models.conv4:Conv4",
    "resnet12": "distmeta.models.resnet12:ResNet12",
    "gaussian": "distmeta.models.policy:Gaussian",
}
