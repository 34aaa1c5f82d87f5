"""docs/metrics.md and the Grafana dashboard are what the table of metrics says."""

from __future__ import annotations

from pathlib import Path

from omni_ray.metrics import METRICS, document
from tests import dashboard

UNITS = ("_total", "_seconds", "_bytes", "_jobs", "_replicas", "_size")
STATES = ("_ready", "_phase", "_scraped")


def test_the_page_of_the_metrics_is_current() -> None:
    page = Path(__file__).parents[2] / "docs/metrics.md"
    assert page.read_text() == document(), "run `make docs`"


def test_the_dashboard_is_current() -> None:
    assert dashboard.FILE.read_text() == dashboard.text(), "run `python -m tests.dashboard`"


def test_the_dashboard_shows_every_metric() -> None:
    shown = dashboard.text()
    assert not [metric.shown for metric in METRICS if metric.shown not in shown]


def test_names_say_the_unit() -> None:
    for metric in METRICS:
        assert metric.name.startswith("omni_ray_")
        assert metric.name.endswith(UNITS + STATES), metric.name
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.boundaries) == (metric.kind == "histogram")
