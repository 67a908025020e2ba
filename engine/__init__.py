"""The engine: problems, networks, the fit, its results."""
