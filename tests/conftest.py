"""The kernels are tested in Triton's interpreter: chosen here, before anything loads Triton."""

import os

os.environ["TRITON_INTERPRET"] = "1"
