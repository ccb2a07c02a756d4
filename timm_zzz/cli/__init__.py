"""The commands of ``python -m timm_zzz``. Each is a module that parses arguments and prints results."""
