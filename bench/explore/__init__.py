"""The paper's own experiments: why a network that was never trained prefers natural images."""
