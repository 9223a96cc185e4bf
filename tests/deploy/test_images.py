"""Dockerfiles and the compose file."""

import json
import re
import sys

import pytest
import yaml
from conftest import REPOSITORY, run, tool
from pinned_wheels import read_lock

DOCKERFILES = sorted((REPOSITORY / "deploy" / "docker").glob("*.Dockerfile"))
COMPOSE = REPOSITORY / "deploy" / "compose.yaml"
CUDA_LOCK = REPOSITORY / "deploy" / "docker" / "cuda.lock"


@pytest.fixture(scope="module")
def all_services():
    return yaml.safe_load(COMPOSE.read_text())["services"]


@pytest.fixture(scope="module")
def services(all_services):
    """Those that are ours."""
    return {name: service for name, service in all_services.items() if service["image"].startswith("espalier-")}


def final_stage(dockerfile):
    return re.split(r"^FROM ", dockerfile.read_text(), flags=re.MULTILINE)[-1]


def test_there_is_an_image_for_each_process():
    assert [path.stem for path in DOCKERFILES] == ["build", "coordinator", "worker-cuda", "worker"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_hadolint_finds_nothing(dockerfile):
    done = run(tool("hadolint"), dockerfile)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("dockerfile", [path for path in DOCKERFILES if path.stem != "build"], ids=lambda path: path.stem)
def test_images_run_as_a_numeric_user_that_is_not_root(dockerfile):
    users = re.findall(r"^USER (\S+)$", final_stage(dockerfile), flags=re.MULTILINE)
    assert users == ["65532:65532"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.stem)
def test_images_are_built_from_what_the_build_context_holds(dockerfile):
    """Each thing copied from the context is let in by .dockerignore, and the whole workspace is."""
    allowed = set(re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), flags=re.MULTILINE))
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(\S+) ", dockerfile.read_text(), flags=re.MULTILINE)
    assert all(any(f"{each}/".startswith(f"{one}/") for one in allowed) for each in {each.rstrip("/") for each in copied} - {"."})
    assert {".cargo", "Cargo.lock", "Cargo.toml", "crates", "deploy/docker", "proto", "services", "tests"} <= allowed
    assert all((REPOSITORY / each).exists() for each in allowed)


def test_the_compose_file_fits_its_schema():
    done = run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", COMPOSE)
    assert done.returncode == 0, done.stdout


def test_compose_starts_a_coordinator_and_two_workers_that_find_it(services):
    assert sorted(services) == ["coordinator", "worker-0", "worker-1"]
    (published,) = services["coordinator"]["ports"]
    host, _, port = published.split(":")
    assert host == "127.0.0.1"
    for name in ("worker-0", "worker-1"):
        environment = services[name]["environment"]
        assert environment["ESPALIER_COORDINATOR"] == f"http://coordinator:{port}"
        listening = services[name]["command"][services[name]["command"].index("--listen") + 1]
        assert environment["ESPALIER_ADVERTISE"] == f"http://{name}:{listening.rsplit(':', 1)[1]}"
        assert "ports" not in services[name]


def test_compose_services_are_confined_and_share_the_folders_that_are_roots(services):
    targets = {}
    for name, service in services.items():
        assert service["user"] == "65532:65532", name
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "/tmp" in service["tmpfs"], name
        assert service["mem_limit"] and service["cpus"], name
        command = service["command"]
        roots = [command[index + 1] for index, argument in enumerate(command) if argument == "--root"]
        targets[name] = {each["target"]: each["source"] for each in service["volumes"] if each["target"] in roots}
        assert sorted(targets[name]) == sorted(roots), name
    assert targets["coordinator"] == targets["worker-0"] == targets["worker-1"]


def test_compose_starts_the_images_that_make_images_makes(services):
    text = (REPOSITORY / "Makefile").read_text()
    (images,) = re.findall(r"^IMAGES \?= (.+)$", text, re.MULTILINE)
    (tag,) = re.findall(r"^IMAGE_TAG \?= (\S+)$", text, re.MULTILINE)
    assert {service["image"] for service in services.values()} == {f"espalier-{image}:{tag}" for image in images.split()}
    assert all(service["pull_policy"] == "never" for service in services.values())


def pins(path):
    found = {pin.name: (pin.version, pin.sha256) for pin in read_lock(path)}
    assert len(found) == len(read_lock(path))
    return found


def test_the_gpu_image_has_the_library_that_the_worker_is_linked_with_and_all_that_it_opens():
    cuda = pins(CUDA_LOCK)
    assert pins(REPOSITORY / "scripts" / "libtorch.lock").items() <= cuda.items()
    opened = {"nvidia-nccl-cu13", "nvidia-cuda-nvrtc", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cusparselt-cu13"}
    assert opened <= cuda.keys()


@pytest.mark.host
def test_the_wheels_of_the_gpu_image_are_in_the_index_with_these_hashes(tmp_path):
    """By pip, for the platforms that the Dockerfile names, without fetching them: they are gigabytes."""
    platforms = re.findall(r"--(?:platform|python-version) \S+", (CUDA_LOCK.parent / "worker-cuda.Dockerfile").read_text())
    assert len(platforms) > 1
    (tmp_path / "wanted.txt").write_text("\n".join(map(str, read_lock(CUDA_LOCK))))
    ways = ("--dry-run", "--ignore-installed", "--no-deps", "--only-binary=:all:", "--use-feature=fast-deps", "--no-cache-dir")
    target = ("--target", tmp_path / "none", "--report", tmp_path / "found.json", "--requirement", tmp_path / "wanted.txt")
    done = run(sys.executable, "-m", "pip", "install", "--quiet", *ways, *" ".join(platforms).split(), *target)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found.json").read_text())["install"]
    found = {
        each["metadata"]["name"]: (each["metadata"]["version"], each["download_info"]["archive_info"]["hashes"]["sha256"])
        for each in report
    }
    assert found == pins(CUDA_LOCK)


def test_the_images_bills_are_written_by_the_syft_that_the_tests_have():
    ((name, pin),) = pins(CUDA_LOCK.parent / "build.lock").items()
    requirements = (REPOSITORY / "tests" / "deploy" / "requirements.txt").read_text()
    assert f"{name}=={pin[0]} \\\n    --hash=sha256:{pin[1]}\n" in requirements


def test_compose_brings_what_to_look_with_configured_by_files_that_are_here(all_services, services):
    others = {name: service for name, service in all_services.items() if name not in services}
    assert sorted(others) == ["collector", "grafana", "jaeger", "prometheus"]
    for name, service in others.items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service.get("volumes", []):
            source, _, mode = volume.split(":")
            assert (COMPOSE.parent / source).exists() and mode == "ro", volume
    environment = services["coordinator"]["environment"]
    collector = yaml.safe_load((COMPOSE.parent / "compose" / "collector.yaml").read_text())
    listens = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == f"http://collector:{listens.rsplit(':', 1)[1]}"
    scraped = yaml.safe_load((COMPOSE.parent / "compose" / "prometheus.yaml").read_text())["scrape_configs"]
    port = environment["ESPALIER_METRICS_LISTEN"].rsplit(":", 1)[1]
    assert scraped[0]["static_configs"][0]["targets"] == [f"{name}:{port}" for name in services]
