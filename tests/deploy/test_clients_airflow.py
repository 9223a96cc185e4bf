"""The example for Airflow: its DAG, run by Airflow itself against a real coordinator and worker with TLS and tokens."""

import json
import os
import subprocess

import pytest
from conftest import REPOSITORY
from deployment import HELD_OUT, MODEL, TEXT, package, secure_deployment  # noqa: F401

DAG = REPOSITORY / "deploy" / "workflows" / "airflow_dag.py"
RUN_DAG = REPOSITORY / "tests" / "deploy" / "run_dag.py"
AIRFLOW = REPOSITORY / ".cache" / "airflow" / "bin"
DAG_S = 300
RUN_AT = "2026-01-02T03:04:05+00:00"


class Airflow:
    def __init__(self, deployment, package, home):
        assert (AIRFLOW / "airflow").is_file(), "Airflow is not there: make test-service lays it out"
        self.deployment = deployment
        host, port = deployment.address.split(":")
        connection = {
            "conn_type": "grpc",
            "host": host,
            "port": int(port),
            "password": deployment.tokens["operate"],
            "extra": {"ca": str(deployment.ca)},
        }
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "PYTHONPATH": str(package),
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__CORE__DAGS_FOLDER": str(DAG.parent),
            "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
            "AIRFLOW_CONN_ESPALIER": json.dumps(connection),
        }
        self.call(AIRFLOW / "airflow", "db", "migrate")

    def call(self, *words):
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DAG_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def run(self, run_at=RUN_AT, lost=(), **params):
        params = {"model": str(MODEL), "data": str(TEXT), "held_out": str(HELD_OUT), "workers": 1, "steps": 20} | params
        said = self.call(AIRFLOW / "python", RUN_DAG, DAG, json.dumps(params), run_at, *lost)
        return json.loads(said.splitlines()[-1])

    def runs(self):
        """How many runs there are."""
        from espalier.v1 import run_service_pb2 as pb
        from espalier_client import Client, Tls

        deployment = self.deployment
        with Client(deployment.address, tls=Tls(ca=deployment.ca), token=deployment.tokens["read"]) as client:
            return len(client.stub.ListRuns(pb.ListRunsRequest()).runs)


@pytest.fixture(scope="module")
def airflow(secure_deployment, package, tmp_path_factory):  # noqa: F811
    return Airflow(secure_deployment, package, tmp_path_factory.mktemp("airflow"))


def test_airflow_prunes_measures_and_exports_and_a_run_that_is_made_again_is_the_same(airflow):
    out = airflow.deployment.folder / "by-airflow"
    first = airflow.run(out=str(out))
    assert first["state"] == "success", first
    assert set(first["tasks"].values()) == {"success"}
    assert first["returned"]["evaluate"] > 1
    assert (out / "config.json").is_file()
    assert (airflow.deployment.folder / "by-airflow-bf16" / "config.json").is_file()
    # As after a task that was lost on its way: the run of that name is there already.
    again = airflow.run(out=str(out))
    assert again["returned"]["create"] == first["returned"]["create"], again
    assert again["tasks"]["evaluate"] == "success"
    assert airflow.runs() == 1


def test_airflow_tries_a_task_again_and_makes_no_second_run(airflow):
    before = airflow.runs()
    out = airflow.deployment.folder / "tried-again"
    done = airflow.run(run_at="2026-01-05T03:04:05+00:00", lost=("create", "evaluate"), out=str(out))
    assert done["state"] == "success", done
    assert done["tries"] == {"create": 2, "wait": 1, "evaluate": 2, "export": 1}
    assert airflow.runs() == before + 1


def test_airflow_does_not_export_what_is_not_good_enough_nor_try_again_what_stays_wrong(airflow):
    folder = airflow.deployment.folder
    bad = airflow.run(run_at="2026-01-03T03:04:05+00:00", out=str(folder / "bad"), max_perplexity=1.0)
    assert (bad["tasks"]["evaluate"], bad["tasks"]["export"]) == ("failed", "upstream_failed"), bad
    assert not (folder / "bad-bf16").exists()
    wrong = airflow.run(run_at="2026-01-04T03:04:05+00:00", out=str(folder / "wrong"), model="/etc/no-model")
    assert wrong["tasks"]["create"] == "failed", wrong
    # Other params under a name that has a run.
    other = airflow.run(run_at="2026-01-03T03:04:05+00:00", out=str(folder / "other"), steps=30)
    assert (other["tasks"]["create"], other["tries"]["create"]) == ("failed", 1), other
    assert wrong["tries"]["create"] == 1
