"""From the command to the first step: how long a run takes to start, from a cold page cache and from a warm one."""

import os
import shutil
import time
from pathlib import Path

import shapes
from espalier_run import began_running, command, events, log_lines
from harness import REPOSITORY, BenchError, start, stop, wait

DEADLINE_S = 1800
POLL_S = 0.01
COLD, WARM = "cold", "warm"
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def cases(place):
    return [shapes.TINY.name] if place.quick else [shapes.SMOLLM2.name, shapes.LLAMA_7B.name]


def sides(_):
    return COLD, WARM


def sources(place):
    return [place.binary("espalier"), place.binary("worker")]


def options(place):
    return {"threads": 1 if place.quick else 2}


def measure(case, side, place):
    shape = {shape.name: shape for shape in (shapes.SMOLLM2, shapes.LLAMA_7B, shapes.TINY)}[case]
    model = shapes.write_model(shape, place.scratch / "models" / shape.name)
    tokens = shapes.write_tokens(shape, place.scratch / f"{shape.name}.u16", 300_000)
    how = forget([model, place.binaries], everything=not place.quick) if side == COLD else read([model])
    out = place.scratch / "startup"
    shutil.rmtree(out, ignore_errors=True)
    # 7B in f32 is 27 GB: its frozen weights stay in bf16.
    storage = "bf16" if shape is shapes.LLAMA_7B else "f32"
    flags = {"threads": options(place)["threads"], "rows": 1, "window_tokens": 32, "storage": storage, "compute": "f32"}
    words, log = command(place, model, tokens, out, flags), out.with_suffix(".log")
    started = time.time()
    process = start(words, log)
    try:
        running = when_running(process, out, log)
        loaded = log_lines(out, "shard loaded")
    finally:
        stop(process)
    seconds = [word.split("=")[1] for _, line in loaded for word in line.split() if word.startswith("seconds=")]
    return {
        "running_s": running - started,
        "load_s": max(map(float, seconds), default=None),
        "model_bytes": (model / "model.safetensors").stat().st_size,
        "storage": storage,
        "cache": how,
    }


def clean_up(place):
    """The 14 GB are not kept once all is measured."""
    shutil.rmtree(place.scratch / "models" / shapes.LLAMA_7B.name, ignore_errors=True)


def when_running(process, out, log):
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        if (running := began_running(events(out))) is not None:
            return running
        if process.returncode is not None or wait(process, POLL_S) is not None:
            break
    raise BenchError(f"the run never got to its first step:\n{log.read_text(errors='replace')[-3000:]}")


def files_of(folders):
    return [path for folder in folders for path in Path(folder).iterdir() if path.is_file()]


def forget(folders, everything):
    """Drops the page cache: all of it where that is wanted and we may, else these files and libtorch."""
    os.sync()
    libraries = REPOSITORY / ".libtorch"
    found = files_of(folders) + [path for path in libraries.rglob("*.so*") if path.is_file()]
    for path in found:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if everything and os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("3\n")
        return "drop_caches"
    return "posix_fadvise"


def read(folders):
    for path in files_of(folders):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    return "read"
