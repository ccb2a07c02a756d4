"""The functions of :mod:`timm_zzz.functional` for the GPU, imported only where they can run."""
