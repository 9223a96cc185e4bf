"""Builds and runs the fuzz targets: see docs/fuzzing.md.

Every target runs for the same time, one after the other, from its seeds and from what earlier runs have found. What
ends a target (a panic, a failed assertion, a sanitizer's report, too much memory or time for one input) fails the run
at its end and lies below fuzz/artifacts.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys

FUZZ = pathlib.Path(__file__).resolve().parent
TRIPLE = "x86_64-unknown-linux-gnu"
# Of one process and of one allocation. The sanitizer alone takes some 150 MB.
MEMORY_MB = 2048
ALLOCATION_MB = 512
SECONDS_PER_INPUT = 10
MAX_INPUT_BYTES = 1 << 16
STATISTICS = {
    "executions": r"stat::number_of_executed_units:\s*(\d+)",
    "memory": r"stat::peak_rss_mb:\s*(\d+)",
    "coverage": r"cov: (\d+)",
}


def cargo_fuzz(*arguments: str, **options) -> subprocess.CompletedProcess:
    cargo = os.environ.get("CARGO", "cargo")
    command = [cargo, "+nightly", "fuzz", *arguments]
    return subprocess.run(command, cwd=FUZZ, check=False, **options)


def targets() -> list[str]:
    return sorted(path.stem for path in (FUZZ / "fuzz_targets").glob("*.rs"))


def write_seeds() -> int:
    if cargo_fuzz("build", "seeds").returncode != 0:
        return 1
    return subprocess.run([FUZZ / "target" / TRIPLE / "release" / "seeds"], check=False).returncode


def run(target: str, seconds: int) -> tuple[bool, dict[str, int]]:
    corpus, artifacts = FUZZ / "corpus" / target, FUZZ / "artifacts" / target
    for folder in (corpus, artifacts):
        folder.mkdir(parents=True, exist_ok=True)
    dictionary = FUZZ / "dictionaries" / f"{target}.dict"
    flags = [
        f"-max_total_time={seconds}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-malloc_limit_mb={ALLOCATION_MB}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-max_len={MAX_INPUT_BYTES}",
        "-print_final_stats=1",
        # Looking for leaks after each input takes several times as long as the input itself; growing memory meets its limit.
        "-detect_leaks=0",
        *([f"-dict={dictionary}"] if dictionary.is_file() else []),
    ]
    folders = [str(corpus), str(FUZZ / "seeds" / target)]
    finished = cargo_fuzz(
        "run", target, *folders, "--", *flags,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )
    (artifacts / "log").write_text(finished.stdout)
    found = {name: re.findall(pattern, finished.stdout) for name, pattern in STATISTICS.items()}
    return finished.returncode == 0, {name: int(values[-1]) if values else 0 for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=30, help="for each target")
    parser.add_argument("--write-seeds", action="store_true", help="write fuzz/seeds anew, and run nothing")
    parser.add_argument("targets", nargs="*", help="all by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.targets) - set(targets()):
        parser.error(f"no such target: {', '.join(sorted(unknown))}; there are {', '.join(targets())}")
    if arguments.write_seeds:
        return write_seeds()
    if cargo_fuzz("build").returncode != 0:
        print("needed are a nightly compiler (`rustup toolchain install nightly`) and `cargo install cargo-fuzz`")
        return 1
    print(f"| {'target':<16} | {'executions':>12} | {'branches':>8} | {'memory':>8} |")
    print(f"| {'-' * 16} | {'-' * 11}: | {'-' * 7}: | {'-' * 7}: |")
    failed = []
    for target in arguments.targets or targets():
        is_sound, numbers = run(target, arguments.seconds)
        print(
            f"| {target:<16} | {numbers['executions']:>12,} | {numbers['coverage']:>8,} | {numbers['memory']:>5} MB |",
            flush=True,
        )
        if not is_sound:
            failed.append(target)
    for target in failed:
        print(f"{target} has ended on an input: see fuzz/artifacts/{target}, the end of `log` first")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
