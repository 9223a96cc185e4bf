#!/usr/bin/env python3
"""Lays out the CPU half of libtorch 2.11.0 under .libtorch/, from the wheels pinned in libtorch.lock.

    scripts/setup_libtorch.py [--dest DIR]

Needs python3 (3.9 or newer) with pip and a package index that pip reaches. 544 MB are fetched (once: the wheels stay
in .cache/wheels, or where ESPALIER_WHEELS says), 500 MB stay in DIR. Nothing is installed, no CUDA is kept. May be
interrupted at any time and run again; DIR/.complete is written last, and without it nothing in DIR counts.
"""

import argparse
import os
import shutil
from pathlib import Path

from pinned_wheels import (
    REPOSITORY,
    WHEELS,
    fetch,
    locked,
    read_lock,
    require_disk,
    require_x86_64_linux,
    run_as_script,
    sha256_of,
    unpack,
    write_whole,
)

LOCK = Path(__file__).resolve().parent / "libtorch.lock"
VERSION = "2.11.0"
FETCHED_BYTES = 560_000_000
UNPACKED_BYTES = 540_000_000

KEPT_PREFIXES = (
    "torch/include/",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    "torch/lib/libtorch_cpu.so",
    "nvidia/cu13/lib/libcudart.so",
    "nvidia/cu13/lib/libcupti.so",
)
# What a build or a start needs first; their absence means that somebody deleted parts by hand.
NEEDED = (
    "torch/build-version",
    "torch/include/torch/csrc/api/include/torch/torch.h",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
    "torch/lib/libtorch.so",
    "torch/lib/libtorch_cpu.so",
    "nvidia/cu13/lib/libcudart.so.13",
    "nvidia/cu13/lib/libcupti.so.13",
)


def is_kept(member):
    return member.startswith(KEPT_PREFIXES) or "LICENSE" in member.upper()


def is_complete(dest, stamp):
    complete = dest / ".complete"
    if not complete.is_file() or complete.read_text(encoding="utf-8").strip() != stamp:
        return False
    return all((dest / name).is_file() and (dest / name).stat().st_size > 0 for name in NEEDED)


def lay_out(dest, stamp, pins, wheels):
    unpacked = dest / ".unpacked"
    if unpacked.exists():
        shutil.rmtree(unpacked)
    have = wheels.is_dir() and all(any(map(pin.is_for, wheels.iterdir())) for pin in pins)
    require_disk(wheels, 0 if have else 2 * FETCHED_BYTES)
    require_disk(dest, UNPACKED_BYTES)
    for pin in pins:
        wheel = fetch(pin, wheels)
        print(f"unpacking {wheel.name}", flush=True)
        unpack(wheel, is_kept, unpacked)

    # torch-sys asks the linker for -ltorch. The wheel's libtorch.so only forwards to libtorch_cpu and
    # libtorch_cuda, so a linker script stands in for it.
    (unpacked / "torch/lib/libtorch.so").write_text("INPUT(libtorch_cpu.so)\n", encoding="utf-8")
    # torch-sys compares this with the version that its bindings were made from.
    (unpacked / "torch/build-version").write_text(VERSION + "\n", encoding="utf-8")

    (dest / ".complete").unlink(missing_ok=True)
    for part in sorted(unpacked.iterdir()):
        old = dest / part.name
        if old.exists():
            shutil.rmtree(old)
        os.rename(part, old)
    unpacked.rmdir()
    os.sync()
    write_whole(dest / ".complete", stamp + "\n")


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--dest", type=Path, default=REPOSITORY / ".libtorch", metavar="DIR", help="default: .libtorch")
    dest = arguments.parse_args().dest.resolve()
    stamp = sha256_of(LOCK)
    if is_complete(dest, stamp):
        print(f"libtorch {VERSION} is in {dest}")
        return
    require_x86_64_linux()
    dest.mkdir(parents=True, exist_ok=True)
    with locked(WHEELS / ".lock"):
        if not is_complete(dest, stamp):
            lay_out(dest, stamp, read_lock(LOCK), WHEELS)
    print(f"libtorch {VERSION} is in {dest}")


if __name__ == "__main__":
    run_as_script(main)
