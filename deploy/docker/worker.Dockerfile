# A worker with the CPU half of libtorch. From the repository root:
#   docker build -f deploy/docker/worker.Dockerfile -t espalier-worker .

FROM docker.io/library/rust:1.95-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# A layer of its own: libtorch is fetched again only when its pins change.
COPY scripts/ scripts/
RUN --mount=type=cache,target=/src/.cache/wheels python3 scripts/setup_libtorch.py
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,id=espalier-worker-target \
    cargo build --release --locked -p worker \
    && install -D --strip -t /image/opt/espalier/bin target/release/worker \
    && mkdir -p /image/opt/espalier/libtorch/torch \
    && cp -a .libtorch/torch/lib /image/opt/espalier/libtorch/torch/ \
    && cp -a .libtorch/nvidia .libtorch/*.dist-info /image/opt/espalier/libtorch/ \
    && install -d /image/models /image/data /image/out

FROM docker.io/library/debian:bookworm-slim
LABEL org.opencontainers.image.title="espalier-worker" \
      org.opencontainers.image.description="Espalier's worker with the CPU half of libtorch" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image/opt/espalier/ /opt/espalier/
COPY LICENSE /usr/share/doc/espalier/LICENSE
# Volumes take over owner and mode of what is here, so that the process may write without being root.
COPY --from=build --chown=65532:65532 /image/models /models
COPY --from=build --chown=65532:65532 /image/data /data
COPY --from=build --chown=65532:65532 /image/out /out
USER 65532:65532
# torch's libraries find one another, and NVIDIA's beside them, from where they lie.
ENV LD_LIBRARY_PATH=/opt/espalier/libtorch/torch/lib \
    ESPALIER_LISTEN=0.0.0.0:7071 \
    ESPALIER_ROOTS=/models:/data:/out \
    ESPALIER_DEVICE=cpu \
    ESPALIER_LOG_FORMAT=json
EXPOSE 7071
ENTRYPOINT ["/opt/espalier/bin/worker"]
