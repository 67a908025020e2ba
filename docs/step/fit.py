"""Fit a picture with what `flashdip export-step` wrote: NumPy and onnxruntime, nothing else.

    flashdip export-step noisy.png -o step.onnx --preset quick
    python fit.py step.onnx restored.ppm 500

With a step that was written for a size, a picture [1, C, H, W] in [0, 1] comes from a NumPy file:

    flashdip export-step 256x256 -o step.onnx --preset quick
    python fit.py step.onnx restored.ppm 500 noisy.npy
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

TYPES = {"F32": np.float32, "I64": np.int64}


def read_state(path):
    """Read a safetensors file: the length of a header, the header, the numbers."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    state = {}
    for name, tensor in json.loads(content[8:end]).items():
        start, stop = (end + offset for offset in tensor["data_offsets"])
        flat = np.frombuffer(content[start:stop], TYPES[tensor["dtype"]])
        state[name] = flat.reshape(tensor["shape"])
    return state


def fit(model, state, iterations):
    """Run the step so often; return the picture, [C, H, W]."""
    session = onnxruntime.InferenceSession(model)  # providers=["CUDAExecutionProvider"], ...
    names = [output.name for output in session.get_outputs()]
    for iteration in range(1, iterations + 1):
        made = dict(zip(names, session.run(names, state), strict=True))
        for name in names:
            if name.startswith("next_"):
                state[name.removeprefix("next_")] = made[name]
        if iteration % 50 == 0:
            print(f"{iteration}/{iterations}: loss {made['loss']:.2e}")
    return made["image"][0]


if __name__ == "__main__":
    model, target, iterations, *picture = sys.argv[1:]
    state = read_state(Path(model).with_suffix(".safetensors"))
    if picture:
        state["observation"] = np.load(picture[0]).astype(np.float32)
    image = fit(model, state, int(iterations))
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    kind = {1: "P5", 3: "P6"}[pixels.shape[2]]  # PGM, or PPM
    header = f"{kind} {pixels.shape[1]} {pixels.shape[0]} 255\n"
    Path(target).write_bytes(header.encode() + pixels.tobytes())
