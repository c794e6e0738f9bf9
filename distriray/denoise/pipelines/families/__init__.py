"""Pipeline families: how each kind of diffusers pipeline is driven step by step, one file a family."""
