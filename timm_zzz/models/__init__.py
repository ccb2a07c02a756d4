"""A ZZZ head on any timm model: the swap, the names in the registry, and weights."""
