"""Writes the Grafana dashboards of the chart. The panels are listed here; everything else about them is alike."""

import json
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "helm" / "espalier" / "dashboards"
RUN = 'run_id=~"$run"'
QUANTILE = "histogram_quantile({share}, sum by (le{by}) (rate({name}_bucket{{{labels}}}[$__rate_interval])))"


def quantile(share, name, labels="", by=""):
    return QUANTILE.format(share=share, name=name, labels=labels, by=by)


# Title, unit, and what is drawn: expression and legend.
RUNS = [
    ("Loss", "none", [(f"espalier_run_loss{{{RUN}}}", "{{run_id}}")]),
    ("Sparsity", "percentunit", [(f"espalier_run_sparsity_ratio{{{RUN}}}", "{{run_id}}")]),
    ("Tokens a second", "none", [(f"sum by (run_id) (rate(espalier_step_tokens_total{{{RUN}}}[$__rate_interval]))", "{{run_id}}")]),
    ("Share of the devices' peak, last step", "percentunit", [(f"espalier_run_flop_utilization_ratio{{{RUN}}}", "{{run_id}}")]),
    ("Floating-point operations a second, last step", "none", [(f"espalier_run_flops_per_second{{{RUN}}}", "{{run_id}}")]),
    (
        "Step",
        "s",
        [
            (quantile(0.5, "espalier_step_duration_seconds", RUN), "median"),
            (quantile(0.99, "espalier_step_duration_seconds", RUN), "99 %"),
            (quantile(0.5, "espalier_step_score_duration_seconds", RUN), "its scores, median"),
        ],
    ),
    (
        "Decision, checkpoint, evaluation (99 %)",
        "s",
        [
            (quantile(0.99, "espalier_decision_duration_seconds", RUN), "decision"),
            (quantile(0.99, "espalier_checkpoint_duration_seconds", RUN), "checkpoint"),
            (quantile(0.99, "espalier_evaluation_duration_seconds", RUN), "evaluation"),
        ],
    ),
    ("Memory of the fullest rank", "bytes", [(f"espalier_run_memory_bytes{{{RUN}}}", "{{run_id}}")]),
    ("Age of the last checkpoint", "s", [(f"espalier_run_checkpoint_age_seconds{{{RUN}}}", "{{run_id}}")]),
    ("Channels kept by layer", "none", [(f'espalier_run_kept{{{RUN},kind="channels"}}', "layer {{layer}}")]),
    ("Query heads kept by layer", "none", [(f'espalier_run_kept{{{RUN},kind="query_heads"}}', "layer {{layer}}")]),
    ("Restarts", "none", [(f"sum by (run_id) (increase(espalier_run_restarts_total{{{RUN}}}[1h]))", "{{run_id}}, last hour")]),
    ("Steps left out", "none", [(f"sum by (run_id) (increase(espalier_steps_skipped_total{{{RUN}}}[1h]))", "{{run_id}}, last hour")]),
]
SERVICE = [
    ("Runs by state", "none", [("sum by (state) (espalier_runs)", "{{state}}")]),
    ("Runs that wait for workers", "none", [("espalier_queue_runs", "waiting")]),
    ("Workers by state", "none", [("sum by (state) (espalier_workers)", "{{state}}")]),
    ("Time since a worker renewed its lease", "s", [("espalier_worker_lease_age_seconds", "{{worker_id}}")]),
    ("Calls a second", "reqps", [("sum by (rpc_method) (rate(rpc_server_call_duration_seconds_count[$__rate_interval]))", "{{rpc_method}}")]),
    (
        "Calls that fail, a second",
        "reqps",
        [
            (
                'sum by (rpc_method, rpc_response_status_code) (rate(rpc_server_call_duration_seconds_count{rpc_response_status_code!="OK"}[$__rate_interval]))',
                "{{rpc_method}} {{rpc_response_status_code}}",
            )
        ],
    ),
    ("Calls, 99 %", "s", [(quantile(0.99, "rpc_server_call_duration_seconds", by=", rpc_method"), "{{rpc_method}}")]),
    ("Scores received", "Bps", [("sum by (run_id) (rate(espalier_scores_received_bytes_total[$__rate_interval]))", "{{run_id}}")]),
    ("Checkpoints written", "Bps", [("sum by (run_id) (rate(espalier_checkpoint_written_bytes_total[$__rate_interval]))", "{{run_id}}")]),
    ("Memory of the workers", "bytes", [("espalier_worker_memory_bytes", "{{instance}} {{state}}")]),
    ("Share of time in collectives", "percentunit", [("rate(espalier_worker_collective_time_seconds_total[$__rate_interval])", "{{instance}}")]),
    ("Steps a second by worker", "none", [("rate(espalier_worker_steps_total[$__rate_interval])", "{{instance}}")]),
]
WIDTH, HEIGHT, COLUMNS = 12, 8, 2


def dashboard(title, uid, panels, by_run):
    source = {"type": "prometheus", "uid": "${source}"}
    variables = [{"name": "source", "label": "Source", "type": "datasource", "query": "prometheus"}]
    if by_run:
        variables.append(
            {
                "name": "run",
                "label": "Run",
                "type": "query",
                "datasource": source,
                "query": "label_values(espalier_step_tokens_total, run_id)",
                "refresh": 2,
                "sort": 2,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": {"text": "All", "value": "$__all"},
            }
        )
    drawn = []
    for place, (name, unit, targets) in enumerate(panels):
        drawn.append(
            {
                "id": place + 1,
                "type": "timeseries",
                "title": name,
                "datasource": source,
                "gridPos": {"w": WIDTH, "h": HEIGHT, "x": place % COLUMNS * WIDTH, "y": place // COLUMNS * HEIGHT},
                "fieldConfig": {"defaults": {"unit": unit, "custom": {"fillOpacity": 0, "lineWidth": 1}}, "overrides": []},
                "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
                "targets": [
                    {"refId": chr(ord("A") + letter), "datasource": source, "expr": expression, "legendFormat": legend}
                    for letter, (expression, legend) in enumerate(targets)
                ],
            }
        )
    return {
        "title": title,
        "uid": uid,
        "schemaVersion": 39,
        "tags": ["espalier"],
        "time": {"from": "now-3h", "to": "now"},
        "refresh": "15s",
        "templating": {"list": variables},
        "panels": drawn,
    }


def written():
    """Text of each file by its name."""
    made = {
        "runs.json": dashboard("Espalier: runs", "espalier-runs", RUNS, True),
        "service.json": dashboard("Espalier: service", "espalier-service", SERVICE, False),
    }
    return {name: json.dumps(each, indent=2) + "\n" for name, each in made.items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in written().items():
        (FOLDER / name).write_text(text)
