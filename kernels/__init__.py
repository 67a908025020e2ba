"""The numerical layer: op sets, the perturbation, resampling.

An *op set* is a module with the functions of `flashdip.kernels.opset.OpSet`. `reference` is the
specification, in naive PyTorch; `native` is the fast one for CPUs and any torch device. A backend
picks one op set, once.
"""
