"""What a model is trained for: `objective(model, batch, generator) -> Loss`."""

OBJECTIVES = {
    "answers": "layerwise.objectives.answers:Answers",
    "cache-reconstruction": "layerwise.objectives.cache:CacheReconstruction",
    "deep-supervision": "layerwise.objectives.deep_supervision:DeepSupervision",
    "forward-forward": "layerwise.objectives.forward_forward:ForwardForward",
    "token-router-lm": "layerwise.objectives.token_routing:TokenRouterLM",
    "mono-forward": "layerwise.objectives.mono_forward:MonoForward",
    "early-exit-lm": "layerwise.objectives.early_exit:EarlyExit",
    "causal-lm": "layerwise.objectives.language:CausalLM",
    "ghn": "layerwise.objectives.ghn:GraphHyperNetwork",
    "router-lm": "layerwise.objectives.routing:RouterLM",
    "masked-units": "layerwise.objectives.masked_units:MaskedUnits",
    "masked-lm": "layerwise.objectives.language:MaskedLM",
    "distilled-masked-lm": "layerwise.objectives.distill:DistilledMaskedLM",
    "classification": "layerwise.objectives.classification:Classification",
    "distillation": "layerwise.objectives.distill:Distillation",
    "filters": "layerwise.objectives.filters:FilterTraining",
    "turned-classification": "layerwise.objectives.turns:TurnedClassification",
    "hidden-distillation": "layerwise.objectives.distill:HiddenDistillation",
    "logit-distillation": "layerwise.objectives.distill:LogitDistillation",
}
