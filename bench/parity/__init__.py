"""The paper's benchmarks on the authors' own inputs, beside the authors' own results."""
