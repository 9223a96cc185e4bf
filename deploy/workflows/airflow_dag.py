"""Creates a run, waits for it, measures its model, and writes it in another format if it is good enough.

Needs deploy/clients/python beside Airflow 3, and a connection `espalier`: host, port, the token as its password, and in its extra
`{"ca": "/path/to/ca.crt"}` where the coordinator has TLS. A task that is tried again finds what it had begun: the run bears the name
of the DAG's run, and is waited for anew.
"""

import datetime
import pathlib

from airflow.sdk import BaseHook, Param, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException
from espalier.v1 import data_pb2, recipe_pb2
from espalier.v1 import run_service_pb2 as pb
from espalier_client import Client, EspalierError, RunFailed, Tls

# What another try would meet again.
LASTING = (
    *("INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "UNAUTHENTICATED"),
    *("FAILED_PRECONDITION", "OUT_OF_RANGE", "UNIMPLEMENTED", "DATA_LOSS"),
)
RETRIES = {"retries": 5, "retry_delay": datetime.timedelta(seconds=10), "retry_exponential_backoff": True}


def client() -> Client:
    """By the connection `espalier`."""
    connection = BaseHook.get_connection("espalier")
    ca = connection.extra_dejson.get("ca")
    tls = Tls(ca=pathlib.Path(ca)) if ca else None
    return Client(f"{connection.host}:{connection.port or 7070}", token=connection.password or None, tls=tls)


def failure(error: EspalierError | RunFailed) -> Exception:
    """The same error, or one that ends the task for good."""
    lasting = isinstance(error, RunFailed) or error.code in LASTING
    return AirflowFailException(str(error)) if lasting else error


@dag(
    dag_id="espalier_prune",
    schedule=None,
    catchup=False,
    tags=["espalier"],
    params={
        "model": Param(type="string", minLength=1, description="Folder of the model, as the workers see it"),
        "data": Param(type="string", minLength=1, description="Text to tune on"),
        "held_out": Param(type="string", minLength=1, description="Text to measure on"),
        "out": Param(type="string", minLength=1, description="Empty or new folder for the pruned model"),
        "workers": Param(4, type="integer", minimum=1),
        "steps": Param(200, type="integer", minimum=1),
        "sparsity": Param(0.5, type="number", exclusiveMinimum=0, exclusiveMaximum=1),
        "max_perplexity": Param(None, type=["null", "number"], description="Worse than this is not exported"),
    },
)
def espalier_prune() -> None:
    @task(**RETRIES)
    def create() -> str:
        context = get_current_context()
        params = context["params"]
        spec = pb.RunSpec(
            display_name=context["run_id"],
            model=params["model"],
            training_data=[data_pb2.TextSource(path=params["data"])],
            recipe=recipe_pb2.Recipe(steps=params["steps"], pruning=recipe_pb2.Pruning(sparsity=params["sparsity"])),
            tp_degree=params["workers"],
            export=pb.ExportSpec(path=params["out"]),
        )
        with client() as espalier:
            try:
                return espalier.create(spec, request_id=f"airflow/espalier_prune/{context['run_id']}").id
            except EspalierError as error:
                raise failure(error) from error

    @task(execution_timeout=datetime.timedelta(days=7), **RETRIES)
    def wait(run: str) -> str:
        with client() as espalier:
            try:
                return espalier.wait(run).id
            except (EspalierError, RunFailed) as error:
                raise failure(error) from error

    @task(execution_timeout=datetime.timedelta(hours=3), **RETRIES)
    def evaluate(run: str) -> float:
        params = get_current_context()["params"]
        held_out = data_pb2.EvaluationSpec(sources=[data_pb2.TextSource(path=params["held_out"])])
        with client() as espalier:
            try:
                (measured,) = espalier.evaluate(run, held_out)
            except EspalierError as error:
                raise failure(error) from error
        most = params["max_perplexity"]
        if most is not None and measured.perplexity > most:
            raise AirflowFailException(f"perplexity {measured.perplexity:.4f} of run {run} is above {most}")
        return measured.perplexity

    # Not tried again by itself: what it wrote before it was lost may be there, and a folder that is not empty is refused.
    @task(execution_timeout=datetime.timedelta(hours=3), retries=0)
    def export(run: str) -> str:
        spec = pb.ExportSpec(path=get_current_context()["params"]["out"] + "-bf16", dtype=pb.EXPORT_DTYPE_BF16)
        with client() as espalier:
            try:
                return espalier.export(run, spec).path
            except EspalierError as error:
                raise failure(error) from error

    run = wait(create())
    evaluate(run) >> export(run)


espalier_prune()
