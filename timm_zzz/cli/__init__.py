"""The commands of ``python -m timm_zzz``: a module each, which parses and prints."""
