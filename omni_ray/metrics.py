"""Every metric of ours: name, kind, unit and labels. vLLM's, Ray's and Serve's stand beside them under their names.

`python -m omni_ray.metrics` prints docs/metrics.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """``name`` ends in its unit, or says what is counted. ``boundaries`` are those of a histogram's buckets."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...]
    boundaries: tuple[float, ...] = ()
    by_ray: bool = True

    @property
    def shown(self) -> str:
        """As it stands at /metrics: what Ray exports bears Ray's prefix."""
        return f"ray_{self.name}" if self.by_ray else self.name


GROUP = ("model", "profile")
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
HTTP_SECONDS = (0.005, 0.01, 0.025, 0.05, *SECONDS)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

HTTP_REQUESTS = Metric(
    "omni_ray_http_requests_total",
    "counter",
    "HTTP requests, by path and by how they were answered: 2xx, 4xx, 429 (refused), 5xx, or left by the client. "
    "No model is told where none was named or none is known by the name.",
    (*GROUP, "path", "outcome"),
)
HTTP_S = Metric(
    "omni_ray_http_request_seconds",
    "histogram",
    "Time of HTTP requests that were answered 2xx, to the last byte.",
    (*GROUP, "path"),
    HTTP_SECONDS,
)
QUEUE_S = Metric(
    "omni_ray_queue_seconds",
    "histogram",
    "Time that a job waited for a place, by where: in the queue of the router, or in its replica.",
    (*GROUP, "hop"),
    SECONDS,
)
QUEUED = Metric("omni_ray_queued_jobs", "gauge", "Jobs in the queue of the router.", GROUP)
RUNNING = Metric("omni_ray_running_jobs", "gauge", "Jobs that the replicas have.", GROUP)
OUTSTANDING_S = Metric(
    "omni_ray_outstanding_seconds", "gauge", "Device time that queued and running jobs still need, estimated.", GROUP
)
REFUSED = Metric("omni_ray_refused_jobs_total", "counter", "Jobs refused with 429, as the queue was full.", GROUP)
READY = Metric("omni_ray_ready", "gauge", "1 where a replica of the group runs, else 0.", GROUP)
REPLICAS = Metric("omni_ray_replicas", "gauge", "Replicas by Ray Serve's state of them.", (*GROUP, "state"))
LOAD_PHASE = Metric(
    "omni_ray_load_phase",
    "gauge",
    "1 for the phase that the newest replica is in, 0 for others.",
    (*GROUP, "phase"),
)
JOBS = Metric("omni_ray_jobs_total", "counter", "Jobs that ended in a replica, by how.", (*GROUP, "outcome"))
STEPS = Metric(
    "omni_ray_steps_total", "counter", "Denoise steps, computed or skipped by a cache.", (*GROUP, "cache", "result")
)
STEP_S = Metric(
    "omni_ray_step_seconds",
    "histogram",
    "Wall time of a job's denoise steps, from the second on; other jobs may have had the device in between.",
    (*GROUP, "cache", "result"),
    STEP_SECONDS,
)
RUN_S = Metric("omni_ray_run_seconds", "histogram", "Time of a job from its first step on.", GROUP, SECONDS)
DEVICE_S = Metric("omni_ray_device_seconds_total", "counter", "Device time of jobs.", GROUP)
FORWARD_S = Metric(
    "omni_ray_forward_seconds",
    "histogram",
    "Device time of one forward of a component (transformer, vae, ...) for all calls that it joined.",
    (*GROUP, "component"),
    STEP_SECONDS,
)
BATCH_SIZE = Metric(
    "omni_ray_forward_batch_size",
    "histogram",
    "How many calls one forward joined at the gate. A request makes one or two a step.",
    (*GROUP, "component"),
    SIZES,
)
CALLS = Metric("omni_ray_forward_calls_total", "counter", "Calls that forwards answered.", (*GROUP, "component"))
OFFLOAD_S = Metric(
    "omni_ray_offload_seconds_total",
    "counter",
    "Copying of offloaded weights to the device: hidden by computation, or paid, that is waited for.",
    (*GROUP, "kind"),
)
MEMORY = Metric(
    "omni_ray_device_memory_bytes",
    "gauge",
    "Memory of a DiT rank's GPU: allocated to tensors, reserved by torch, peak of allocated since it was told last, "
    "total of the device. A rank on a CPU tells none.",
    (*GROUP, "replica", "rank", "kind"),
)
NODE_SCRAPED = Metric(
    "omni_ray_node_scraped", "gauge", "1 where the node's metrics are part of this page, else 0.", ("node",), (), False
)

METRICS = (
    *(HTTP_REQUESTS, HTTP_S),
    *(QUEUE_S, QUEUED, RUNNING, OUTSTANDING_S, REFUSED, READY, REPLICAS, LOAD_PHASE),
    *(JOBS, STEPS, STEP_S, RUN_S, DEVICE_S, FORWARD_S, BATCH_SIZE, CALLS, OFFLOAD_S, MEMORY),
    NODE_SCRAPED,
)

PAGE = """# Metrics

Made by `make docs` from `omni_ray/metrics.py`.

`/metrics` of any ingress address has the metrics of every node of the cluster in the Prometheus format: ours, vLLM's as
`ray_vllm_*`, Ray Serve's as `ray_serve_*`, Ray's as `ray_*`. One target is enough:

```yaml
scrape_configs:
  - job_name: omni_ray
    scrape_interval: 10s
    static_configs: [{targets: ["127.0.0.1:8000"]}]
```

`helm/omni-ray/dashboards/omni-ray.json` is a Grafana dashboard of them: import it and choose the data source. It is
made by `python -m tests.dashboard`, and `tests/contract/test_dashboard.py` runs its queries in a real Prometheus.

Ray exports every 10 seconds, so a value is that old at most. It keeps the counts of a histogram's buckets, but takes
the middle of its bucket for every value: `_count` and quantiles are right, `_sum` is an estimate. A mean is better made
of the counters, such as device seconds by steps. Ray adds labels of its own: the node, the process, the version.

| name | kind | labels | |
|---|---|---|---|
"""


def document() -> str:
    """docs/metrics.md."""
    rows = [f"| `{m.shown}` | {m.kind} | {', '.join(m.labels)} | {m.description} |\n" for m in METRICS]
    return PAGE + "".join(rows)


if __name__ == "__main__":
    print(document(), end="")
