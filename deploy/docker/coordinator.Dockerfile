# The coordinator and the command line. From the repository root:
#   docker build -f deploy/docker/coordinator.Dockerfile -t espalier-coordinator .

FROM docker.io/library/rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# Neither binary reaches libtorch, so nothing of it is fetched here.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target,id=espalier-coordinator-target \
    cargo build --release --locked -p coordinator -p espalier \
    && install -D --strip -t /image/usr/local/bin target/release/coordinator target/release/espalier \
    && install -d /image/var/lib/espalier /image/models /image/data /image/out

FROM docker.io/library/debian:bookworm-slim
LABEL org.opencontainers.image.title="espalier-coordinator" \
      org.opencontainers.image.description="Espalier's coordinator and command line" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image/usr/local/bin/ /usr/local/bin/
COPY LICENSE /usr/share/doc/espalier/LICENSE
# Volumes take over owner and mode of what is here, so that the process may write without being root.
COPY --from=build --chown=65532:65532 /image/var/lib/espalier /var/lib/espalier
COPY --from=build --chown=65532:65532 /image/models /models
COPY --from=build --chown=65532:65532 /image/data /data
COPY --from=build --chown=65532:65532 /image/out /out
USER 65532:65532
ENV ESPALIER_LISTEN=0.0.0.0:7070 \
    ESPALIER_DATA_DIR=/var/lib/espalier \
    ESPALIER_ROOTS=/models:/data:/out \
    ESPALIER_LOG_FORMAT=json
EXPOSE 7070
ENTRYPOINT ["/usr/local/bin/coordinator"]
