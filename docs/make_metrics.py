# ruff: noqa: E501  (rows of Markdown tables, PromQL)
"""Writes docs/metrics.md from raymoe/observe/catalogue.py and docs/dashboards/raymoe.json:
`python docs/make_metrics.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymoe.observe.catalogue import GROUPS, MetricSpec

DOCS = Path(__file__).parent
TARGET, DASHBOARD = DOCS / "metrics.md", DOCS / "dashboards" / "raymoe.json"
HEAD = """# Metrics

Made from `raymoe/observe/catalogue.py` by `python docs/make_metrics.py`; a test keeps it true.

`GET /metrics` of the endpoint is Prometheus text. Whichever gateway replica answers, the numbers
are those of the whole deployment: gateways tell the placement controller every 2 s what they have
counted, counters are summed over all gateways (also those that have ended) and never run backwards.
While the controller does not answer, and for 5 s after a new one has started, a gateway that knows
of others leaves sums out rather than show them too small; `raymoe_controller_up` is 0 then. Series
of the controller and of routers begin anew with their process, as Prometheus expects.

The same goes through Ray's own metrics agents (ray.util.metrics; `ray.metrics: false` turns it
off), told by the controller every 5 s: the same names with `ray_` before them, and a tag
`deployment`. There the parts of histograms are of type gauge (Ray's own histograms take single
values only; `rate` and `histogram_quantile` work all the same), and a group or router that is gone
shows 0 for the rest of the controller's life.

Serving metrics have vLLM's names with `raymoe_` for `vllm:`, and its buckets. To use a dashboard
made for vLLM, let Prometheus rename them:

```yaml
scrape_configs:
  - job_name: raymoe
    static_configs: [{targets: ["raymoe.example:8000"]}]
    metric_relabel_configs:
      - {source_labels: [__name__], regex: "raymoe_(.+)", target_label: __name__, replacement: "vllm:$1"}
      - {target_label: model_name, replacement: "my-model"}
```

There is one series a group, router, layer, route or cause; series of single experts come only when
asked for, with `/metrics?experts=1` (a big model has many: 60 layers of 256 experts are 1.5 MB and
0.3 s of the gateway's time, so ask seldom). A Grafana dashboard is in
[dashboards/raymoe.json](dashboards/raymoe.json): import it and choose the Prometheus data source.
"""
TAIL = """
## What to divide by what

| question | PromQL |
|---|---|
| tokens a second | `rate(raymoe_generation_tokens_total[1m])` |
| time to first token, 95 % | `histogram_quantile(0.95, rate(raymoe_time_to_first_token_seconds_bucket[5m]))` |
| how long a group takes to answer | `rate(raymoe_group_latency_seconds_total[1m]) / rate(raymoe_group_messages_total[1m])` |
| part of a router's time spent waiting for groups | `rate(raymoe_dispatch_seconds_total{part="wait"}[1m])` |
| part of prompts found in the cache | `rate(raymoe_prefix_cache_hits_total[5m]) / rate(raymoe_prefix_cache_queries_total[5m])` |
| what plans promised and brought | `raymoe_plan_gain_predicted`, `raymoe_plan_gain_realised` |
"""


def render() -> str:
    """docs/metrics.md."""
    text = HEAD
    for title, specs in GROUPS:
        text += (
            f"\n## {title}\n\n| name | type | unit | labels | what it is |\n|---|---|---|---|---|\n"
        )
        for spec in specs:
            labels = ", ".join(f"`{label}`" for label in spec.labels)
            text += f"| `{spec.name}` | {spec.kind} | {spec.unit} | {labels} | {spec.text} |\n"
    return text + TAIL


_Q = "histogram_quantile({q}, sum by (le) (rate(raymoe_{name}_bucket[$__rate_interval])))"


def _quantiles(name: str) -> list[tuple[str, str]]:
    return [(_Q.format(q=q, name=name), f"p{round(100 * q)}") for q in (0.5, 0.95, 0.99)]


def _rate(name: str) -> str:
    return f"rate(raymoe_{name}[$__rate_interval])"


# title, unit, [(expression, legend)]
ROWS: tuple[tuple[str, tuple[tuple[str, str, list[tuple[str, str]]], ...]], ...] = (
    (
        "Serving",
        (
            (
                "Tokens a second",
                "short",
                [
                    (_rate("generation_tokens_total"), "generated"),
                    (_rate("prompt_tokens_total"), "prompt"),
                ],
            ),
            (
                "Requests",
                "short",
                [
                    ("raymoe_num_requests_running", "running"),
                    ("raymoe_num_requests_waiting", "waiting"),
                    ("raymoe_gateway_requests_in_flight", "in flight at gateways"),
                ],
            ),
            ("Time to first token", "s", _quantiles("time_to_first_token_seconds")),
            ("Time between tokens", "s", _quantiles("inter_token_latency_seconds")),
            ("Whole request", "s", _quantiles("e2e_request_latency_seconds")),
            (
                "Answers by status",
                "reqps",
                [(f"sum by (status) ({_rate('http_requests_total')})", "{{status}}")],
            ),
            (
                "Outputs by end",
                "short",
                [(_rate("request_success_total"), "{{finished_reason}}")],
            ),
            (
                "KV cache in use",
                "percentunit",
                [("raymoe_kv_cache_usage_perc", "{{router}}")],
            ),
        ),
    ),
    (
        "Placement",
        (
            (
                "Balancedness",
                "percentunit",
                [
                    ("raymoe_balancedness", "all layers"),
                    ("min(raymoe_layer_balancedness)", "worst layer"),
                ],
            ),
            ("Load by group (pairs/s)", "short", [("raymoe_group_load", "{{group}}")]),
            (
                "Answer time by group",
                "s",
                [
                    (
                        f"{_rate('group_latency_seconds_total')} / {_rate('group_messages_total')}",
                        "{{group}}",
                    )
                ],
            ),
            ("Queue by group (pairs)", "short", [("raymoe_group_queued_pairs", "{{group}}")]),
            (
                "Expert bytes by group",
                "bytes",
                [
                    ("raymoe_group_resident_bytes", "{{group}}"),
                    ("raymoe_group_memory_bytes", "{{group}} may hold"),
                ],
            ),
            ("Replicas by group", "short", [("raymoe_group_replicas", "{{group}}")]),
            (
                "Replicas brought a second",
                "short",
                [
                    (_rate("migrations_total"), "from {{source}}"),
                    (_rate("migrations_failed_total"), "failed"),
                ],
            ),
            (
                "Plans: gain",
                "percentunit",
                [
                    ("raymoe_plan_gain_predicted", "promised"),
                    ("raymoe_plan_gain_realised", "brought"),
                ],
            ),
        ),
    ),
    (
        "Trouble",
        (
            (
                "Groups, controller, experts",
                "short",
                [
                    ("sum(raymoe_group_up)", "groups ready"),
                    ("raymoe_controller_up", "controller answers"),
                    ("raymoe_ready", "every expert ready"),
                ],
            ),
            ("Deaths of groups", "short", [("raymoe_group_deaths_total", "{{group}}")]),
            (
                "Retries and failovers a second",
                "short",
                [
                    (f"sum({_rate('router_retried_pairs_total')})", "retried pairs"),
                    (f"sum({_rate('router_links_lost_total')})", "links lost"),
                    (f"sum({_rate('router_deadlines_total')})", "links given up"),
                    (f"sum({_rate('router_nacks_total')})", "refused messages"),
                ],
            ),
            (
                "Outputs that went on at another router",
                "short",
                [("raymoe_gateway_resubmitted_total", "resubmitted")],
            ),
        ),
    ),
)


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard, two panels a row."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, charts in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": 24, "x": 0, "y": y},
                "panels": [],
            }
        )
        y += 1
        for at, (name, unit, targets) in enumerate(charts):
            panels.append(_panel(len(panels) + 1, name, unit, targets, at, y))
        y += 8 * -(-len(charts) // 2)
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    return {
        "title": "raymoe",
        "uid": "raymoe",
        "tags": ["raymoe"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(
    panel_id: int, name: str, unit: str, targets: list[tuple[str, str]], at: int, y: int
) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "id": panel_id,
        "type": "timeseries",
        "title": name,
        "datasource": source,
        "gridPos": {"h": 8, "w": 12, "x": 12 * (at % 2), "y": y + 8 * (at // 2)},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(65 + i), "expr": expr, "legendFormat": legend, "datasource": source}
            for i, (expr, legend) in enumerate(targets)
        ],
    }


def names_of(specs: tuple[MetricSpec, ...]) -> set[str]:
    """The series that Prometheus knows of these metrics."""
    names = set()
    for spec in specs:
        ends = ("_bucket", "_sum", "_count") if spec.kind == "histogram" else ("",)
        names |= {spec.name + end for end in ends}
    return names


if __name__ == "__main__":
    TARGET.write_text(render())
    DASHBOARD.write_text(json.dumps(dashboard(), indent=2) + "\n")
