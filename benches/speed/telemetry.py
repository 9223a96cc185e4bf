"""Steps with traces and metrics sent to a real collector (rotel) against steps without."""

import os
import re
import socket
import time

import shapes
from espalier_run import prune
from harness import REPOSITORY, BenchError, start, stop, wait

DEADLINE_S = 1800
OFF, ON = "off", "OTLP"
COLLECTOR = REPOSITORY / ".cache" / "rotel" / "rotel" / "rotel-agent"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def cases(place):
    # The shortest steps that anyone would train by: what telemetry costs weighs most.
    return [shapes.TINY.name] if place.quick else [shapes.SMOLLM2.name]


def sides(_):
    return OFF, ON


def sources(place):
    return [place.binary("espalier"), place.binary("worker")]


def options(place):
    return {"steps": place.steps or (4 if place.quick else 40)}


def measure(case, side, place):
    shape = {shape.name: shape for shape in (shapes.SMOLLM2, shapes.TINY)}[case]
    model = shapes.write_model(shape, place.scratch / "models" / shape.name)
    data = shapes.write_tokens(shape, place.scratch / f"{shape.name}.u16", 300_000)
    flags = {"threads": 2, "steps": options(place)["steps"], "rows": 1, "window_tokens": 16 if place.quick else 256}
    flags |= {"warmup": 0.7, "ramp_shape": "one-shot", "compensation": "none", "storage": "f32", "compute": "f32"}
    out = place.scratch / "telemetry"
    if side == OFF:
        return prune(place, model, data, out, flags, DEADLINE_S)
    port, spans = free_port(), place.scratch / "telemetry-collector.log"
    collector = start(collector_command(port), spans)
    try:
        until_listening(collector, port, spans)
        os.environ[ENDPOINT] = f"http://127.0.0.1:{port}"
        figures = prune(place, model, data, out, flags, DEADLINE_S)
    finally:
        os.environ.pop(ENDPOINT, None)
        stop(collector)
    received = len(re.findall(r"Name +: step$", spans.read_text(errors="replace"), re.MULTILINE))
    if received < options(place)["steps"]:
        raise BenchError(f"the collector has seen {received} steps: see {spans}")
    return figures | {"step_spans": received}


def collector_command(port):
    if not COLLECTOR.is_file():
        raise BenchError(f"{COLLECTOR} is missing: make bench-telemetry lays it out")
    words = ["start", "--otlp-grpc-endpoint", f"127.0.0.1:{port}", "--otlp-http-endpoint", f"127.0.0.1:{free_port()}"]
    return [COLLECTOR, *words, "--exporter", "blackhole", "--debug-log", "traces", "--debug-log-verbosity", "detailed"]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def until_listening(collector, port, log):
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if wait(collector, 0.1) is not None:
                break
    raise BenchError(f"the collector does not listen:\n{log.read_text(errors='replace')[-2000:]}")
