#!/usr/bin/env python3
"""Packs what `check.py` needs on a machine with a GPU into one archive: binaries, a tiny model, texts, the scripts.

    pack.py --binaries target/release --example target/release/examples/gpu_check --out out/gpu-check.tar.gz

Binaries are packed without their symbols. An archive above 60 MiB is refused.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MOST_BYTES = 60 * 2**20
STRIP_DEADLINE_S = 120
BINARIES = ("coordinator", "worker", "espalier")
MODEL = REPOSITORY / "tests/fixtures/models/stories260k"
TEXTS = [REPOSITORY / "tests/fixtures/text" / name for name in ("tiny.txt", "held_out.txt")]
SCRIPTS = [HERE / name for name in ("check.py", "reference.py")]
TOP = "gpu-check"


def stripped(binary, folder):
    """A copy without symbols."""
    if not binary.is_file():
        sys.exit(f"{binary} is missing; `make gpu-check` builds it")
    out = folder / binary.name
    subprocess.run(["strip", "-s", "-o", out, binary], check=True, timeout=STRIP_DEADLINE_S)
    return out


def pack(binaries, example, out):
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(out.name + ".unfinished")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(unfinished, "w:gz", compresslevel=6) as archive:
            for binary in [*(binaries / name for name in BINARIES), example]:
                archive.add(stripped(binary, Path(folder)), f"{TOP}/bin/{binary.name}")
            archive.add(MODEL, f"{TOP}/model")
            for text in TEXTS:
                archive.add(text, f"{TOP}/text/{text.name}")
            for script in SCRIPTS:
                archive.add(script, f"{TOP}/{script.name}")
    size = unfinished.stat().st_size
    if size > MOST_BYTES:
        unfinished.unlink()
        sys.exit(f"the archive would have {size / 2**20:.1f} MiB, more than {MOST_BYTES // 2**20}")
    unfinished.rename(out)
    return size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binaries", type=Path, default=REPOSITORY / "target/release")
    parser.add_argument("--example", type=Path, default=REPOSITORY / "target/release/examples/gpu_check")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "out/gpu-check.tar.gz")
    given = parser.parse_args()
    size = pack(given.binaries, given.example, given.out)
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    print(f"on a machine with a GPU and torch 2.11: tar xf {given.out.name} && python3 {TOP}/check.py")


if __name__ == "__main__":
    main()
