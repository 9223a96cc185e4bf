"""Runs a DAG once with Airflow itself: `run_dag.py FILE CONF RUN_AT [LOST…]`.

Prints the state of each task, how often it was tried, and what it returned, as JSON. Tasks that are named LOST fail at their first try,
after all is done. Runs in an environment with Airflow, which the tests do not have.
"""

import datetime
import functools
import json
import sys

from airflow.dag_processing.dagbag import DagBag


def lose_the_first_try(task):
    """As when a worker dies before it can tell what it did."""
    call, done = task.python_callable, []

    @functools.wraps(call)
    def tried(*arguments, **named):
        done.append(call(*arguments, **named))
        if len(done) == 1:
            raise ConnectionError("lost on its way")
        return done[-1]

    task.python_callable = tried


def main(file, conf, run_at, *lost):
    bag = DagBag(file)
    assert not bag.import_errors, bag.import_errors
    (dag,) = bag.dags.values()
    for name in lost:
        lose_the_first_try(dag.get_task(name))
    at = datetime.datetime.fromisoformat(run_at)
    run = dag.test(run_after=at, logical_date=at, run_conf=json.loads(conf))
    tasks = {each.task_id: each for each in run.get_task_instances()}
    returned = {name: each.xcom_pull(task_ids=name) for name, each in tasks.items()}
    states = {name: str(each.state) for name, each in tasks.items()}
    tries = {name: each.try_number for name, each in tasks.items()}
    print(json.dumps({"state": str(run.state), "tasks": states, "tries": tries, "returned": returned}))


if __name__ == "__main__":
    main(*sys.argv[1:])
