# A worker with the CPU half of libtorch.
#   make images

ARG BUILD=espalier-build:0.1.0
FROM ${BUILD} AS build

FROM docker.io/library/debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libstdc++6 \
    && rm -rf /var/lib/apt/lists/*
LABEL org.opencontainers.image.title="espalier-worker" \
      org.opencontainers.image.description="Espalier's worker with the CPU half of libtorch" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="docker.io/library/debian:bookworm-slim" \
      espalier.sbom="/usr/share/espalier/sbom.cdx.json"
COPY --from=build /image/worker/root/ /
# Volumes take over owner and mode of what is here, so that the process may write without being root.
COPY --from=build --chown=65532:65532 /image/worker/owned/ /
USER 65532:65532
# torch's libraries find one another, and NVIDIA's beside them, from where they lie.
ENV LD_LIBRARY_PATH=/opt/espalier/libtorch/torch/lib \
    ESPALIER_LISTEN=0.0.0.0:7071 \
    ESPALIER_ROOTS=/models:/data:/out \
    ESPALIER_DEVICE=cpu \
    ESPALIER_LOG_FORMAT=json
EXPOSE 7071
ENTRYPOINT ["/opt/espalier/bin/worker"]
