"""The Triton kernels: the fitting step on GPUs, as a list of launches."""
