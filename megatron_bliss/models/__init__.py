"""The small models, proxy and score model: what they compute, how they are trained."""
