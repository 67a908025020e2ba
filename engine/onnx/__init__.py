"""ONNX graphs, built node by node from the network's description: its forward pass and its fit."""
