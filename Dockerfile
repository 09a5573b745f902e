# One file, two images:
#   docker build --target cpu  -t xkv-service:cpu  --build-arg TORCH_INDEX=<PyTorch's CPU index> .
#   docker build --target cuda -t xkv-service:cuda .
# TORCH_INDEX is where pip looks for torch first; empty means PyPI, whose Linux wheels bring CUDA along.
FROM python:3.11-slim AS base
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /app
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN torch="$(grep '^torch==' constraints.txt)" \
    && if [ -n "$TORCH_INDEX" ]; then pip install --index-url "$TORCH_INDEX" "$torch"; else pip install "$torch"; fi
COPY artifacts artifacts
COPY xkv_service xkv_service
COPY workers workers
COPY cli cli
RUN pip install --constraint constraints.txt '.[s3,pdf]' \
    && useradd --create-home --uid 1000 xkv \
    && mkdir /store /models \
    && chown xkv /store /models
USER xkv
ENV XKV_STORE=/store
VOLUME /store

FROM base AS cpu
CMD ["xkv", "--help"]

FROM base AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["xkv", "--help"]
