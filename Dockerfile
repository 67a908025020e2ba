# FlashDIP with PyTorch, ONNX Runtime and TensorRT on NVIDIA GPUs, all built for CUDA 13; see docs/onnx.md.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Ubuntu keeps the newest version of a package only, so that none can be pinned.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1 python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*

# The libraries of CUDA, cuDNN and TensorRT come with these packages; torch brings its own Triton.
COPY . /source
RUN grep -v '^triton' /source/constraints/gpu.txt > /tmp/constraints.txt \
 && python3 -m venv /opt/flashdip \
 && /opt/flashdip/bin/pip install --no-cache-dir --constraint /tmp/constraints.txt "/source[gpu,tensorrt]" \
 && rm -r /source /tmp/constraints.txt

RUN useradd --create-home --uid 10001 flashdip \
 && install --directory --owner=flashdip --mode=700 /cache
ENV PATH=/opt/flashdip/bin:$PATH \
    XDG_CACHE_HOME=/cache \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /pictures
ENTRYPOINT ["flashdip"]
CMD ["doctor"]
