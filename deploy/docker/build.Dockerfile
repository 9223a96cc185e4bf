# Everything that the images are made of, compiled once: `make images` builds this and then the others from it.
#   docker build -f deploy/docker/build.Dockerfile -t espalier-build:0.1.0 .

FROM docker.io/library/rust:1.95-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY deploy/docker/build.lock deploy/docker/build.lock
RUN python3 -m pip install --no-cache-dir --break-system-packages --no-deps --require-hashes --only-binary=:all: \
      --requirement deploy/docker/build.lock
# A layer of its own: libtorch is fetched again only when its pins change.
COPY scripts/ scripts/
RUN --mount=type=cache,target=/src/.cache/wheels python3 scripts/setup_libtorch.py
COPY . .
# Dependencies, and what of them is compiled, are kept between builds.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked -p coordinator -p espalier -p worker \
    && bash deploy/docker/lay_out.sh target/release .libtorch /image
