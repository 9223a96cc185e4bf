# The coordinator and the command line, and nothing else but the C library: no shell, no package manager.
#   make images

ARG BUILD=espalier-build:0.1.0
FROM ${BUILD} AS build

FROM docker.io/library/debian:bookworm-slim AS base
# The C library looks names up by itself; certificates are for object stores and databases behind TLS.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /image/lib64 /image/lib/x86_64-linux-gnu /image/etc/ssl/certs \
    && install -d -m 1777 /image/tmp \
    && cp -L /lib64/ld-linux-x86-64.so.2 /image/lib64/ \
    && for library in libc.so.6 libm.so.6 libgcc_s.so.1 libresolv.so.2 libnss_dns.so.2 libnss_files.so.2; do \
         cp -L "/lib/x86_64-linux-gnu/$library" /image/lib/x86_64-linux-gnu/; done \
    && cp -L /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ \
    && echo 'espalier:x:65532:65532::/var/lib/espalier:/sbin/nologin' > /image/etc/passwd \
    && echo 'espalier:x:65532:' > /image/etc/group \
    && echo 'hosts: files dns' > /image/etc/nsswitch.conf

FROM scratch
LABEL org.opencontainers.image.title="espalier-coordinator" \
      org.opencontainers.image.description="Espalier's coordinator and command line" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="scratch" \
      espalier.sbom="/usr/share/espalier/sbom.cdx.json"
COPY --from=base /image/ /
COPY --from=build /image/coordinator/root/ /
# Volumes take over owner and mode of what is here, so that the process may write without being root.
COPY --from=build --chown=65532:65532 /image/coordinator/owned/ /
USER 65532:65532
ENV PATH=/usr/local/bin \
    ESPALIER_LISTEN=0.0.0.0:7070 \
    ESPALIER_DATA_DIR=/var/lib/espalier \
    ESPALIER_ROOTS=/models:/data:/out \
    ESPALIER_LOG_FORMAT=json
EXPOSE 7070
ENTRYPOINT ["/usr/local/bin/coordinator"]
