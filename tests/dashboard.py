"""The Grafana dashboard: `python -m tests.dashboard` rewrites helm/omni-ray/dashboards/omni-ray.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_ray import metrics as m
from omni_ray.metrics import Metric

FILE = Path(__file__).parents[1] / "helm/omni-ray/dashboards/omni-ray.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
OURS = 'model=~"$model"'
VLLM = 'model_name=~"($model)(:.*)?"'
WINDOW = "[$__rate_interval]"
GROUP = "{{model}} {{profile}}"
NUM_COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True)
class Panel:
    """``queries`` are pairs of an expression and the legend of its series."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]


def rate(metric: Metric | str, by: str, matching: str = OURS) -> str:
    name = metric if isinstance(metric, str) else metric.shown
    return f"sum by ({by}) (rate({name}{{{matching}}}{WINDOW}))"


def value(metric: Metric | str, by: str, matching: str = OURS, of: str = "sum") -> str:
    name = metric if isinstance(metric, str) else metric.shown
    return f"{of} by ({by}) ({name}{{{matching}}})"


def quantiles(
    metric: Metric | str, by: str, legend: str, matching: str = OURS, of: tuple[float, ...] = (0.5, 0.95)
) -> tuple[tuple[str, str], ...]:
    name = metric if isinstance(metric, str) else metric.shown
    buckets = rate(f"{name}_bucket", f"le, {by}", matching)
    return tuple((f"histogram_quantile({each}, {buckets})", f"P{each * 100:.0f} {legend}") for each in of)


def one(title: str, unit: str, expression: str, legend: str) -> Panel:
    return Panel(title, unit, ((expression, legend),))


def overview() -> tuple[Panel, ...]:
    phase = f"{value(m.LOAD_PHASE, 'model, profile, phase', of='max')} == 1"
    return (
        one("Requests", "reqps", rate(m.HTTP_REQUESTS, "model, profile, outcome"), f"{GROUP} {{{{outcome}}}}"),
        one("Requests by path", "reqps", rate(m.HTTP_REQUESTS, "path"), "{{path}}"),
        Panel("Latency to the last byte", "s", quantiles(m.HTTP_S, "model, profile", GROUP, of=(0.5, 0.95, 0.99))),
        one("Ready", "bool_yes_no", value(m.READY, "model, profile", of="max"), GROUP),
        one("Replicas", "short", value(m.REPLICAS, "model, profile, state"), f"{GROUP} {{{{state}}}}"),
        one("Load phase", "short", phase, f"{GROUP} {{{{phase}}}}"),
    )


def queue() -> tuple[Panel, ...]:
    return (
        Panel("Queue time", "s", quantiles(m.QUEUE_S, "model, profile, hop", f"{GROUP} {{{{hop}}}}")),
        one("Device seconds outstanding", "s", value(m.OUTSTANDING_S, "model, profile"), GROUP),
        one("Refused jobs", "reqps", rate(m.REFUSED, "model, profile"), GROUP),
        one("Queued jobs", "short", value(m.QUEUED, "model, profile"), GROUP),
        one("Running jobs", "short", value(m.RUNNING, "model, profile"), GROUP),
        one("Jobs ended", "reqps", rate(m.JOBS, "model, profile, outcome"), f"{GROUP} {{{{outcome}}}}"),
    )


def dit() -> tuple[Panel, ...]:
    calls, forwards = rate(m.CALLS, "model, component"), rate(f"{m.BATCH_SIZE.shown}_count", "model, component")
    seconds, steps = rate(m.DEVICE_S, "model, profile"), rate(m.STEPS, "model, profile")
    computed = rate(m.STEPS, "model, profile", f'{OURS}, result="computed"')
    part = "{{model}} {{component}}"
    sizes = ((f"{calls} / {forwards}", f"mean {part}"), *quantiles(m.BATCH_SIZE, "model, component", part, of=(0.95,)))
    return (
        Panel("Time per step", "s", quantiles(m.STEP_S, "model, profile, result", f"{GROUP} {{{{result}}}}")),
        one("Steps", "ops", rate(m.STEPS, "model, profile, cache, result"), f"{GROUP} {{{{cache}}}} {{{{result}}}}"),
        one("Share of steps skipped", "percentunit", f"1 - {computed} / {steps}", GROUP),
        Panel("Device time per forward", "s", quantiles(m.FORWARD_S, "model, component", part)),
        Panel("Batch size at the gate", "short", sizes),
        one("Forwards", "ops", forwards, part),
        one("Devices at work", "short", seconds, GROUP),
        one("Device time per step", "s", f"{seconds} / {steps}", GROUP),
        Panel("Time of a job from its first step", "s", quantiles(m.RUN_S, "model, profile", GROUP)),
    )


def ar() -> tuple[Panel, ...]:
    by, name = "model_name", "{{model_name}}"
    waiting, running = (value(f"ray_vllm_num_requests_{each}", by, VLLM) for each in ("waiting", "running"))
    written, read = (rate(f"ray_vllm_{each}_tokens_total", by, VLLM) for each in ("generation", "prompt"))
    return (
        Panel("Time to first token", "s", quantiles("ray_vllm_time_to_first_token_seconds", by, name, VLLM)),
        Panel(
            "Time per output token", "s", quantiles("ray_vllm_request_time_per_output_token_seconds", by, name, VLLM)
        ),
        Panel("End to end", "s", quantiles("ray_vllm_e2e_request_latency_seconds", by, name, VLLM)),
        Panel("Tokens per second", "short", ((written, f"out {name}"), (read, f"in {name}"))),
        one("KV cache in use", "percentunit", value("ray_vllm_kv_cache_usage_perc", by, VLLM, "max"), name),
        Panel("Requests", "short", ((running, f"running {name}"), (waiting, f"waiting {name}"))),
    )


def memory() -> tuple[Panel, ...]:
    ranks, where = value(m.MEMORY, "model, profile, replica, rank, kind"), "{{replica}}/{{rank}} {{kind}}"
    processes = "topk(12, sum by (ip, Component) (ray_component_rss_bytes))"
    return (
        one("GPU memory of DiT ranks", "bytes", ranks, f"{GROUP} {where}"),
        one("GPU memory in use", "mbytes", "sum by (ip, GpuIndex) (ray_node_gram_used)", "{{ip}} GPU {{GpuIndex}}"),
        one("Offload: copying", "short", rate(m.OFFLOAD_S, "model, profile, kind"), f"{GROUP} {{{{kind}}}}"),
        one("Host memory in use", "percentunit", "ray_node_mem_used / ray_node_mem_total", "{{ip}}"),
        one("Host memory by process", "bytes", processes, "{{ip}} {{Component}}"),
        one("Object store of Ray", "bytes", "sum by (NodeAddress) (ray_object_store_used_memory)", "{{NodeAddress}}"),
    )


def nodes() -> tuple[Panel, ...]:
    return (
        one("Nodes scraped", "short", m.NODE_SCRAPED.shown, "{{node}}"),
        one("CPU in use", "percent", "ray_node_cpu_utilization", "{{ip}}"),
        one("Network received", "Bps", "ray_node_network_receive_speed", "{{ip}}"),
    )


ROWS = {
    "Overview": overview(),
    "Queue": queue(),
    "DiT engine": dit(),
    "AR": ar(),
    "Memory and offload": memory(),
    "Nodes": nodes(),
}


def dashboard() -> dict[str, Any]:
    """What Grafana imports."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": place(0, y, 24, 1)})
        for i, panel in enumerate(row):
            at = place(i % NUM_COLUMNS * WIDTH, y + 1 + i // NUM_COLUMNS * HEIGHT, WIDTH, HEIGHT)
            panels.append(timeseries(panel) | {"gridPos": at})
        y += 1 + -(-len(row) // NUM_COLUMNS) * HEIGHT
    return {
        "title": "omni_ray",
        "uid": "omni-ray",
        "tags": ["omni_ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [variable("datasource"), variable("model")]},
        "panels": [{"id": i + 1} | panel for i, panel in enumerate(panels)],
    }


def place(x: int, y: int, width: int, height: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": width, "h": height}


def timeseries(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expression, "legendFormat": legend}
        for i, (expression, legend) in enumerate(panel.queries)
    ]
    defaults = {"unit": panel.unit, "min": 0, "custom": {"fillOpacity": 10, "showPoints": "never"}}
    return {
        "type": "timeseries",
        "title": panel.title,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {"tooltip": {"mode": "multi"}, "legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": targets,
    }


def variable(name: str) -> dict[str, Any]:
    if name == "datasource":
        return {"name": name, "label": "Data source", "type": "datasource", "query": "prometheus"}
    names = "|".join((m.READY.shown, m.HTTP_REQUESTS.shown))
    query = f'label_values({{__name__=~"{names}"}}, model)'
    choice = {"multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    source = {"datasource": SOURCE, "query": {"query": query, "refId": "model"}, "definition": query, "refresh": 2}
    return {"name": name, "label": "Model", "type": "query", "sort": 1} | source | choice


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(text())
