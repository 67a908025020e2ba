"""The engine: problems, networks, the fit and its results. It imports `kernels` and nothing above."""
