"""What the set-up scripts do when things go wrong: bad bytes, no index, an interruption, a full disk."""

import base64
import hashlib
import importlib.util
import os
import platform
import shutil
import zipfile
from collections import namedtuple

import fetch_demo
import pinned_wheels
import pytest
import setup_libtorch
from conftest import REPOSITORY, run
from pinned_wheels import Pin, SetupError


def make_wheel(folder, name, version, members):
    """A wheel that pip takes, with a few small members."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in files.items():
            archive.writestr(member, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{member},sha256={digest},{len(text)}\n"
        archive.writestr(f"{info}/RECORD", record)
    return path


def pin_of(wheel):
    name, version = wheel.name.split("-")[:2]
    return Pin(f"{name}=={version} --hash=sha256:{pinned_wheels.sha256_of(wheel)}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes wheels from, in place of the package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheels(tmp_path):
    return tmp_path / "wheels"


def kept(wheels):
    return sorted(each.name for each in wheels.iterdir())


def test_a_wheel_is_fetched_once_and_then_found_without_the_index(index, wheels):
    offered = make_wheel(index, "tiny", "1.0", {"tiny/a.txt": "a"})
    pin = pin_of(offered)
    first = pinned_wheels.fetch(pin, wheels)
    assert first.read_bytes() == offered.read_bytes()
    offered.unlink()
    assert pinned_wheels.fetch(pin, wheels) == first
    assert kept(wheels) == [first.name]


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
def test_a_damaged_wheel_is_fetched_again(index, wheels, damage):
    offered = make_wheel(index, "tiny", "1.0", {"tiny/a.txt": "a" * 1000})
    pin = pin_of(offered)
    have = pinned_wheels.fetch(pin, wheels)
    good = offered.read_bytes()
    have.write_bytes({"truncated": good[:-200], "changed": good[:60] + b"x" + good[61:], "empty": b""}[damage])
    assert pinned_wheels.fetch(pin, wheels).read_bytes() == good


def test_other_bytes_than_the_pinned_ones_are_not_kept(index, wheels):
    pin = pin_of(make_wheel(index, "tiny", "1.0", {"tiny/a.txt": "a"}))
    make_wheel(index, "tiny", "1.0", {"tiny/a.txt": "b"})
    with pytest.raises(SetupError, match="other bytes for tiny==1.0"):
        pinned_wheels.fetch(pin, wheels)
    assert kept(wheels) == []


def test_an_index_without_the_wheel_says_what_to_do(index, wheels):
    pin = Pin("tiny==1.0 --hash=sha256:" + "0" * 64)
    with pytest.raises(SetupError, match=r"(?s)could not fetch tiny==1.0.*PIP_INDEX_URL.*lay the wheel"):
        pinned_wheels.fetch(pin, wheels)
    assert kept(wheels) == []


def test_a_download_that_was_cut_off_is_cleared_away(index, wheels):
    pin = pin_of(make_wheel(index, "tiny", "1.0", {"tiny/a.txt": "a"}))
    left = wheels / ".part-killed"
    left.mkdir(parents=True)
    (left / "tiny-1.0-py3-none-any.whl").write_bytes(b"half")
    assert kept(wheels) == [".part-killed"]
    assert pinned_wheels.fetch(pin, wheels).is_file()
    assert kept(wheels) == ["tiny-1.0-py3-none-any.whl"]


def test_a_machine_without_pip_is_told_how_to_get_it(wheels, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="apt-get install python3-pip"):
        pinned_wheels.fetch(Pin("tiny==1.0 --hash=sha256:" + "0" * 64), wheels)


def test_a_wheel_whose_members_are_damaged_is_named(tmp_path):
    wheel = make_wheel(tmp_path, "tiny", "1.0", {"tiny/a.txt": "a" * 1000})
    data = bytearray(wheel.read_bytes())
    data[60] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(SetupError, match="tiny-1.0.*cannot be unpacked"):
        pinned_wheels.unpack(wheel, lambda member: True, tmp_path / "out")


@pytest.mark.parametrize("line", ["tiny", "tiny==1.0", "tiny==1.0 --hash=sha256:abc", "tiny>=1.0 --hash=sha256:" + "0" * 64])
def test_a_lock_line_without_version_and_whole_hash_is_refused(line):
    with pytest.raises(SetupError, match="not a pin"):
        Pin(line)


@pytest.mark.parametrize("lock", ["libtorch.lock", "demo.lock"])
def test_the_committed_locks_can_be_read(lock):
    assert pinned_wheels.read_lock(REPOSITORY / "scripts" / lock)


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 5 * 10**6))
    with pytest.raises(SetupError, match="5 MB free and 100 MB are needed"):
        pinned_wheels.require_disk(tmp_path / "not" / "there" / "yet", 100_000_000)


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [
        ("Darwin", "arm64", ("", "")),
        ("Linux", "aarch64", ("glibc", "2.36")),
        ("Linux", "x86_64", ("", "")),  # musl
        ("Linux", "x86_64", ("glibc", "2.17")),
    ],
)
def test_a_machine_that_libtorch_has_no_binaries_for_is_refused(system, machine, libc, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(platform, "libc_ver", lambda: libc)
    with pytest.raises(SetupError, match=f"this machine is {system} {machine}"):
        pinned_wheels.require_x86_64_linux()


@pytest.fixture
def tiny_libtorch(index):
    """Wheels with the few members that a laid-out libtorch must have."""
    members = {name: "x" for name in setup_libtorch.NEEDED if name.startswith("torch/")}
    members["torch/lib/libtorch_cuda.so"] = "never kept"
    cuda = {name: "x" for name in setup_libtorch.NEEDED if name.startswith("nvidia/")}
    return [pin_of(make_wheel(index, "torch", "2.11.0", members)), pin_of(make_wheel(index, "cuda_parts", "13.0", cuda))]


def test_libtorch_is_laid_out_without_its_cuda_half(tmp_path, wheels, tiny_libtorch):
    dest = tmp_path / "libtorch"
    setup_libtorch.lay_out(dest, "stamp", tiny_libtorch, wheels)
    assert setup_libtorch.is_complete(dest, "stamp")
    assert not setup_libtorch.is_complete(dest, "stamp of other pins")
    assert (dest / "torch/lib/libtorch.so").read_text() == "INPUT(libtorch_cpu.so)\n"
    assert (dest / "torch/build-version").read_text() == "2.11.0\n"
    assert not (dest / "torch/lib/libtorch_cuda.so").exists()
    assert not (dest / ".unpacked").exists()


@pytest.mark.parametrize("broken_at", ["unpack", "rename", "stamp"])
def test_an_interrupted_set_up_is_never_taken_for_a_whole_one(tmp_path, wheels, tiny_libtorch, broken_at, monkeypatch):
    dest = tmp_path / "libtorch"
    module, function = {
        "unpack": (setup_libtorch, "unpack"),
        "rename": (os, "rename"),
        "stamp": (setup_libtorch, "write_whole"),
    }[broken_at]
    real = getattr(module, function)
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == (1 if broken_at == "stamp" else 2):
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, function, interrupted)
        with pytest.raises(KeyboardInterrupt):
            setup_libtorch.lay_out(dest, "stamp", tiny_libtorch, wheels)
    assert not setup_libtorch.is_complete(dest, "stamp")
    setup_libtorch.lay_out(dest, "stamp", tiny_libtorch, wheels)
    assert setup_libtorch.is_complete(dest, "stamp")


def test_new_pins_replace_what_was_laid_out_before(tmp_path, wheels, tiny_libtorch):
    dest = tmp_path / "libtorch"
    setup_libtorch.lay_out(dest, "old", tiny_libtorch, wheels)
    (dest / "torch/include/of_the_old_version.h").write_text("x")
    setup_libtorch.lay_out(dest, "new", tiny_libtorch, wheels)
    assert setup_libtorch.is_complete(dest, "new")
    assert not (dest / "torch/include/of_the_old_version.h").exists()


def test_a_part_that_was_deleted_or_emptied_is_noticed(tmp_path, wheels, tiny_libtorch):
    dest = tmp_path / "libtorch"
    setup_libtorch.lay_out(dest, "stamp", tiny_libtorch, wheels)
    for lost in setup_libtorch.NEEDED:
        text = (dest / lost).read_text()
        (dest / lost).write_text("")
        assert not setup_libtorch.is_complete(dest, "stamp"), lost
        (dest / lost).unlink()
        assert not setup_libtorch.is_complete(dest, "stamp"), lost
        (dest / lost).write_text(text)
        assert setup_libtorch.is_complete(dest, "stamp"), lost


def test_the_demo_files_count_only_with_their_pinned_bytes(tmp_path, index, wheels, monkeypatch):
    pin = pin_of(make_wheel(index, "tiny", "1.0", {"tiny/text": "right", "tiny/other": "not wanted"}))
    files = [("tiny/text", "place/text", hashlib.sha256(b"right").hexdigest())]
    monkeypatch.setattr(fetch_demo, "WHEELS", wheels)
    for before in (None, "half"):
        if before:
            (tmp_path / "place" / "text").write_text(before)
        fetch_demo.lay_out(pin, files, tmp_path)
        assert (tmp_path / "place" / "text").read_text() == "right"
    assert not list(tmp_path.glob(".part-*"))
    (tmp_path / "place" / "text").unlink()
    with pytest.raises(SetupError, match="holds no tiny/text with sha256"):
        fetch_demo.lay_out(pin, [("tiny/text", "place/text", "0" * 64)], tmp_path)


def test_missing_tools_are_all_named_at_once(tmp_path):
    (tmp_path / "cut").symlink_to(shutil.which("cut"))
    script = REPOSITORY / "scripts" / "check_tools.sh"
    done = run("/bin/sh", script, "--tests", env={"PATH": str(tmp_path)})
    assert done.returncode == 1
    for tool in ("cargo 1.90", "C++ compiler", "python3 3.11"):
        assert tool in done.stderr


def test_an_old_cargo_is_named_with_its_version(tmp_path):
    old = tmp_path / "cargo"
    old.write_text("#!/bin/sh\necho 'cargo 1.63.0 (old)'\n")
    old.chmod(0o755)
    script = REPOSITORY / "scripts" / "check_tools.sh"
    done = run("/bin/sh", script, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1
    assert "cargo 1.90 or newer (found 1.63.0)" in done.stderr
