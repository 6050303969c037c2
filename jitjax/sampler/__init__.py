"""Steps, stages, anchors, lifting, micro-flow: the sampler, which knows no model."""
