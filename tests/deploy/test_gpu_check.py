"""The archive of `make gpu-check`, packed, unpacked and run on the CPU: everything but the device call itself."""

import importlib.util
import json
import subprocess
import sys
import tarfile

import pytest
from conftest import REPOSITORY

SCRIPTS = REPOSITORY / "scripts" / "gpu_check"
DEBUG = REPOSITORY / "target" / "debug"
LIBTORCH = REPOSITORY / ".libtorch" / "torch" / "lib"
TINY = "32,2,4,2,48,64"
RUN_DEADLINE_S = 300


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"gpu_check_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """What stands on the GPU machine after `tar xf`."""
    folder = tmp_path_factory.mktemp("gpu-check")
    archive = folder / "gpu-check.tar.gz"
    pack = loaded("pack")
    size = pack.pack(DEBUG, DEBUG / "examples" / "gpu_check", archive)
    assert size == archive.stat().st_size <= 60 * 2**20
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / "gpu-check"


def check(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(folder / "check.py"), *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=RUN_DEADLINE_S,
        check=False,
    )


def test_the_whole_check_runs_on_a_cpu_at_a_tiny_shape(unpacked, tmp_path):
    out = tmp_path / "results.json"
    sizes = ["--shape", TINY, "--window", 32, "--micro", 2, "--ramp", 2, "--threads", 1]
    done = check(unpacked, "--device", "cpu", "--libtorch", LIBTORCH, *sizes, "--no-reference", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert all(state in ("ok", "") for _, _, state in written["rows"]), done.stdout
    checks = [what for what, _, state in written["rows"] if state == "ok"]
    for wanted in ("device answers", "2 ranks by Gloo", "nf4", "espalier prune", "step, int8 base"):
        assert any(wanted in what for what in checks), f"{wanted} is not among {checks}"
    results = written["results"]
    assert results["f32, 2 ranks by Gloo"]["masks"] == results["cpu f32"]["masks"]
    ramp = results["step f32"]["ramp"]
    assert [point["kept_parameters"] for point in ramp] == sorted((p["kept_parameters"] for p in ramp), reverse=True)
    assert len(ramp) == 2 and ramp[-1]["kept_parameters"] == pytest.approx(0.5)
    assert results["step f32"]["loss"] == pytest.approx(results["step int8"]["loss"], rel=1e-2)


def test_a_machine_without_a_gpu_is_told_what_is_missing(unpacked, tmp_path):
    out = tmp_path / "results.json"
    done = check(unpacked, "--device", "cuda:999", "--libtorch", LIBTORCH, "--out", out)
    assert done.returncode == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row[2] == "FAILED" and "CUDA" in row[1], row


def test_a_libtorch_that_is_none_is_refused(unpacked, tmp_path):
    done = check(unpacked, "--libtorch", tmp_path)
    assert done.returncode == 1 and "libtorch_cpu.so" in done.stderr, done.stderr


def test_an_archive_that_is_too_large_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    pack = loaded("pack")
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    monkeypatch.setattr(pack, "stripped", lambda binary, folder: binary)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name in (*pack.BINARIES, "gpu_check"):
        (binaries / name).write_bytes(b"\0")
    with pytest.raises(SystemExit, match="MiB"):
        pack.pack(binaries, binaries / "gpu_check", tmp_path / "out" / "archive.tar.gz")
    assert list((tmp_path / "out").iterdir()) == []


def test_losses_and_masks_are_compared_as_the_bounds_mean():
    compare = loaded("check")
    assert compare.difference([1.0, 2.02], [1.0, 2.0]) == pytest.approx(0.01)
    mask = [[{"query_heads": [0, 1], "channels": [3]}]]
    other = [[{"query_heads": [0, 2], "channels": [3]}]]
    assert compare.overlap(mask, mask) == 1.0
    assert compare.overlap(other, mask) == pytest.approx(2 / 3)
