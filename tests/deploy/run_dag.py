"""Runs a DAG once with Airflow itself: `run_dag.py FILE CONF RUN_AT`. Prints the state of each task and what it returned, as JSON.

Runs in an environment with Airflow, which the tests do not have.
"""

import datetime
import json
import sys

from airflow.dag_processing.dagbag import DagBag


def main(file, conf, run_at):
    bag = DagBag(file)
    assert not bag.import_errors, bag.import_errors
    (dag,) = bag.dags.values()
    at = datetime.datetime.fromisoformat(run_at)
    run = dag.test(run_after=at, logical_date=at, run_conf=json.loads(conf))
    tasks = {each.task_id: each for each in run.get_task_instances()}
    returned = {name: each.xcom_pull(task_ids=name) for name, each in tasks.items()}
    states = {name: str(each.state) for name, each in tasks.items()}
    print(json.dumps({"state": str(run.state), "tasks": states, "returned": returned}))


if __name__ == "__main__":
    main(*sys.argv[1:])
