"""ZZZ heads on timm models: attach a head, register model names, load weights, predict."""
