# A worker with all of libtorch, NCCL and what else of CUDA it opens, from wheels by hash. The driver is the host's.
#   make images IMAGES=worker-cuda

ARG BUILD=espalier-build:0.1.0
FROM ${BUILD} AS build

FROM docker.io/library/debian:bookworm-slim AS libraries
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
COPY deploy/docker/cuda.lock /cuda.lock
# Headers, test programs and Python's own parts are of no use to the worker.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --no-deps --require-hashes --only-binary=:all: --no-compile --python-version 3.12 \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 \
      --platform manylinux_2_18_x86_64 --platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 \
      --target /image/opt/espalier/libtorch --requirement /cuda.lock
WORKDIR /image/opt/espalier/libtorch
RUN find . -type f ! -name '*.so*' ! -ipath '*.dist-info/*' -delete \
    && rm -rf torch/bin torch/test \
    && find . -type d -empty -delete

FROM docker.io/library/debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libstdc++6 \
    && rm -rf /var/lib/apt/lists/*
LABEL org.opencontainers.image.title="espalier-worker-cuda" \
      org.opencontainers.image.description="Espalier's worker with libtorch, NCCL and CUDA's libraries" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim" \
      espalier.sbom="/usr/share/espalier/sbom.cdx.json"
COPY --from=libraries /image/ /
COPY --from=build /image/worker-cuda/root/ /
# Volumes take over owner and mode of what is here, so that the process may write without being root.
COPY --from=build --chown=65532:65532 /image/worker-cuda/owned/ /
USER 65532:65532
# What NVIDIA's container runtime mounts of the driver.
ENV LD_LIBRARY_PATH=/opt/espalier/libtorch/torch/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ESPALIER_LISTEN=0.0.0.0:7071 \
    ESPALIER_ROOTS=/models:/data:/out \
    ESPALIER_DEVICE=cuda \
    ESPALIER_LOG_FORMAT=json
EXPOSE 7071
ENTRYPOINT ["/opt/espalier/bin/worker"]
