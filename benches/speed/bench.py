#!/usr/bin/env python3
"""Measures speed and memory: `make bench`, or one of them.

    bench.py NAME... [--quick] [--rounds 3] [--steps N] [--minutes 15]   step, run, tp, startup, telemetry, decision,
                                                                    load, or all

Sides take turns, round by round, so that what else the machine does falls on all of them. Each sample is kept at once in
benches/results/NAME.json; a command that was stopped goes on where it was, and begins anew when a program, a script or an
option has changed. docs.py makes tables and pictures of what is there. Needs the programs, optimised, and the environment
that `make` lays out.
"""

import argparse
import signal
import sys
import time
from pathlib import Path

import decision
import load
import startup
import step
import telemetry
import tensor_parallel
import whole_run
from harness import REPOSITORY, BenchError, Place, Results, digest_of, stop_all

BENCHES = {
    "step": step,
    "run": whole_run,
    "tp": tensor_parallel,
    "startup": startup,
    "telemetry": telemetry,
    "decision": decision,
    "load": load,
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*BENCHES, "all"], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="seconds, on a tiny model: to see that it works")
    parser.add_argument("--rounds", type=int, help="rounds of all sides [default: 3, 1 with --quick]")
    parser.add_argument("--steps", type=int, help="steps of a sample")
    parser.add_argument("--minutes", type=float, default=15, help="how long the soak of `load` takes [default: 15]")
    parser.add_argument("--cases", help="only cases that begin so, such as smollm2")
    parser.add_argument("--binaries", type=Path, default=REPOSITORY / "target" / "release", help="the programs")
    parser.add_argument("--scratch", type=Path, default=REPOSITORY / ".cache" / "bench", help="models, logs, runs")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benches" / "results")
    given = parser.parse_args()
    if given.quick and given.results == parser.get_default("results"):
        parser.error("--quick says nothing of speed: name another folder with --results")
    return given


def measure(name, place, only):
    bench = BENCHES[name]
    results = Results(place.results / f"{name}.json", name, digest_of(bench.sources(place)), bench.options(place))
    wanted = [
        (case, side, round_index)
        for round_index in range(place.rounds)
        for case in bench.cases(place)
        if case.startswith(only)
        for side in bench.sides(case)
    ]
    missing = [key for key in wanted if not results.has(*key)]
    print(f"{name}: {len(wanted)} samples, {len(wanted) - len(missing)} there", flush=True)
    for case, side, round_index in missing:
        started = time.monotonic()
        results.add(case, side, round_index, bench.measure(case, side, place))
        print(f"{name}: {case}, {side}, round {round_index + 1}: {time.monotonic() - started:.1f} s", flush=True)
    if hasattr(bench, "clean_up"):
        bench.clean_up(place)


def main():
    given = arguments()
    # An ended bench ends what it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    place = Place(
        binaries=given.binaries.resolve(),
        scratch=given.scratch.resolve(),
        results=given.results.resolve(),
        quick=given.quick,
        rounds=given.rounds or (1 if given.quick else 3),
        steps=given.steps,
        minutes=given.minutes,
    )
    names = list(BENCHES) if "all" in given.names else given.names
    try:
        for name in names:
            measure(name, place, given.cases or "")
    except BenchError as error:
        sys.exit(f"error: {error}")
    finally:
        stop_all()


if __name__ == "__main__":
    main()
