"""The arithmetic of the ZZZ head: plain PyTorch, Triton kernels, and the choice between them."""
