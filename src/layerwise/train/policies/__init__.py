"""What acts on a training run from outside, at a few named moments; see `layerwise.train.policies.policy`."""

from layerwise.train.policies.policy import Policy

POLICIES = {
    "capacity-rates": "layerwise.train.policies.rates:CapacityRates",
    "importance-rates": "layerwise.train.policies.rates:ImportanceRates",
    "clip-parameters": "layerwise.train.policies.clip:ClipParameters",
    "keep-zeros": "layerwise.train.policies.keep_zeros:KeepZeros",
    "random-ltd": "layerwise.train.policies.random_ltd:RandomLTD",
    "freeze": "layerwise.train.policies.freeze:Freeze",
    "gradient-norms": "layerwise.train.policies.gradients:GradientNorms",
    "growth": "layerwise.train.policies.growth:Growth",
    "layer-cost": "layerwise.train.policies.layer_cost:LayerCost",
    "layer-dropout": "layerwise.train.policies.layer_dropout:LayerDropout",
    "ledger": "layerwise.train.policies.ledger:Ledger",
    "loqt": "layerwise.train.policies.loqt:LoQTUpdates",
    "per-layer-updates": "layerwise.train.policies.per_layer:PerLayerUpdates",
    "restart-adapters": "layerwise.train.policies.restart:RestartAdapters",
    "rotation": "layerwise.train.policies.rotation:Rotation",
}

__all__ = ["POLICIES", "Policy"]
