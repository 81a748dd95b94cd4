"""Gradients to updates: optimizers, parameter groups by depth, learning-rate schedules."""

OPTIMIZERS = {
    "adamw": "torch.optim:AdamW",
    "adam": "torch.optim:Adam",
    "sgd": "torch.optim:SGD",
    "rmsprop": "torch.optim:RMSprop",
    "adagrad": "torch.optim:Adagrad",
    "apollo": "layerwise.optim.lowrank:APOLLO",
    "fira": "layerwise.optim.lowrank:Fira",
    "galore": "layerwise.optim.lowrank:GaLore",
    "gsm": "layerwise.optim.gsm:GSM",
    "layca": "layerwise.optim.layca:Layca",
    "scale": "layerwise.optim.scale:Scale",
    "muon": "layerwise.optim.muon:Muon",
}
