#!/usr/bin/env python3
"""Makes the cells of docs/results.md: prunes and measures one model by every row of setting.toml.

    python3 benches/quality/run.py --data DIR --model DIR --out DIR [--rows a,b] [--seeds 0,1,2] [--sparsity 0.5,0.2]
    python3 benches/quality/table.py

Each cell (row, sparsity, seed) becomes one file below results/. A file that is there and was made by the recipe and
setting of now is not made again, so the command may be killed and repeated; a change of a recipe makes its cells anew.
Cells run side by side (--parallel), each pinned to cores of its own. DIR of --data holds c4, wikipedia, wikitext2, ptb
and zeroshot as setting.toml names them. Python 3.11, Linux, nothing but the standard library.
"""

import argparse
import fcntl
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

from cell import Place, inputs, is_done, make, result_path
from measured import CommandError, end_with_parent
from setting import RECIPES, REPOSITORY, RESULTS, SETTING, Setting, SettingError

POLL_S = 5
STOP_DEADLINE_S = 60


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts and tasks")
    parser.add_argument("--model", type=Path, required=True, help="model folder in Hugging Face layout")
    parser.add_argument("--out", type=Path, required=True, help="scratch: runs, logs, exported weights")
    parser.add_argument("--rows", type=_list(str), help="some rows only, such as ours,oneshot-taylor")
    parser.add_argument("--seeds", type=_list(int), default=[0, 1, 2])
    parser.add_argument("--sparsity", type=_list(float), default=[0.5, 0.2], help="in the order to be made in")
    parser.add_argument("--parallel", type=int, default=1, help="cells at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads and cores of a cell")
    parser.add_argument("--keep", action="store_true", help="keep the exported weights below --out")
    parser.add_argument("--without-zeroshot", action="store_true", help="perplexity only")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what is there of them")
    parser.add_argument("--binaries", type=Path, default=REPOSITORY / "target" / "release", help="espalier and worker")
    parser.add_argument("--setting", type=Path, default=SETTING)
    parser.add_argument("--recipes", type=Path, default=RECIPES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _list(kind):
    return lambda text: [kind(part) for part in text.split(",")]


def main():
    given = arguments()
    setting = Setting.read(given.setting, given.recipes)
    rows = [setting.row(name) for name in given.rows] if given.rows else setting.rows
    cells = setting.schedule(rows, given.sparsity, given.seeds)
    place = Place(
        binaries=given.binaries.resolve(),
        model=given.model.resolve(),
        data=given.data.resolve(),
        out=given.out.resolve(),
        results=given.results.resolve(),
        threads=given.threads,
        keep=given.keep,
        with_zeroshot=not given.without_zeroshot,
        parallel=given.parallel,
    )
    found_inputs = inputs(setting, place)
    missing = [cell for cell in cells if not is_done(cell, setting, place, found_inputs)]
    print(f"{len(cells)} cells, {len(cells) - len(missing)} there, {len(missing)} to make", flush=True)
    if given.dry_run:
        for cell in cells:
            stale = "anew" if result_path(cell, place).exists() else "to make"
            print(f"{'there' if cell not in missing else stale:8} {cell.name}")
        return 0
    cores = sorted(os.sched_getaffinity(0))
    if given.parallel < 1 or given.threads < 1 or given.parallel * given.threads > len(cores):
        raise SettingError(f"--parallel times --threads must lie in 1..={len(cores)}, the cores that are here")
    slots = [cores[slot * given.threads :][: given.threads] for slot in range(given.parallel)]
    place.out.mkdir(parents=True, exist_ok=True)
    with open(place.out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError(f"another call works in {place.out}") from None
        place = with_own_binaries(place)
        check_recipes(missing, setting, place)
        return work_off(missing, slots, setting, place, found_inputs)


def with_own_binaries(place):
    """Copies the programs below --out: a build in the meantime must not change them between two cells."""
    own = place.out / "bin"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    for name in ("espalier", "worker"):
        if not (place.binaries / name).is_file():
            raise SettingError(f"there is no {place.binaries / name}: build it, or name its folder with --binaries")
        shutil.copy2(place.binaries / name, own / name)
    place = replace(place, binaries=own)
    said = subprocess.run(
        [place.espalier, "eval", "--help"], env=place.environment(), capture_output=True, text=True, timeout=60, check=True
    )
    if place.with_zeroshot and "--tasks" not in said.stdout:
        raise SettingError("this espalier has no `eval --tasks`: build it anew, or use --without-zeroshot")
    return place


def check_recipes(cells, setting, place):
    """Has the program itself check the first cell of every row, before hours are spent on the others."""
    for cell in {cell.row.name: cell for cell in reversed(cells) if cell.row.trained}.values():
        command = setting.prune_arguments(
            cell,
            espalier=place.espalier,
            model=place.model,
            data=place.data,
            out=place.out / "never",
            recipe=cell.row.recipe,
            threads=place.threads,
        )
        said = subprocess.run(
            [*command, "--dry-run"], env=place.environment(), capture_output=True, text=True, timeout=60, check=False
        )
        if said.returncode != 0:
            raise SettingError(f"`{cell.row.name}` cannot run: {said.stderr.strip()}\n{' '.join(command)}")


def work_off(cells, slots, setting, place, found_inputs):
    """Makes all cells, one at a time in each slot; the number of those that failed decides the exit status."""
    # A slot's process is forked while there is one thread, and takes nothing but its arguments from here.
    context = multiprocessing.get_context("fork")
    waiting, running, failed = list(cells), {}, []
    free = list(range(len(slots)))
    start = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                cell, slot = waiting.pop(0), free.pop(0)
                process = context.Process(target=in_slot, args=(cell, slots[slot], setting, place, found_inputs))
                process.start()
                running[process.sentinel] = (process, cell, slot, time.monotonic())
            for sentinel in wait(list(running), timeout=POLL_S):
                process, cell, slot, began = running.pop(sentinel)
                process.join()
                free.append(slot)
                if process.exitcode != 0:
                    failed.append(cell.name)
                took, all_took = time.monotonic() - began, time.monotonic() - start
                how = "made" if process.exitcode == 0 else "FAILED"
                left = len(waiting) + len(running)
                print(f"{all_took / 60:7.1f} min  {how} {cell.name} in {took / 60:.1f} min, {left} left", flush=True)
    finally:
        for process, *_ in running.values():
            process.terminate()
        for process, *_ in running.values():
            process.join(STOP_DEADLINE_S)
    if failed:
        print(f"{len(failed)} cells failed: {', '.join(failed)}; the reasons are above", file=sys.stderr)
    return 1 if failed else 0


def in_slot(cell, cores, setting, place, found_inputs):
    """The process of one cell: on its cores, never longer than its parent, and ended with all that it has started."""
    end_with_parent()
    signal.signal(signal.SIGTERM, stopped)
    os.sched_setaffinity(0, cores)
    try:
        make(cell, setting, place, found_inputs)
    except KeyboardInterrupt:
        sys.exit(130)
    except (CommandError, SettingError, OSError, KeyError, ValueError) as error:
        print(f"{cell.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


def stopped(_signal, _frame):
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stopped)
    try:
        sys.exit(main())
    except SettingError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read has gone; devnull, or the interpreter complains once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted; the cells that are done stay done", file=sys.stderr)
        sys.exit(130)
