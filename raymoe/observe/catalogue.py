"""Every metric there is: name, kind, unit, labels, what it says. docs/metrics.md is made of it.

Serving metrics have vLLM's names with raymoe_ for vllm:, so that its dashboards port over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MetricSpec:
    """One metric.

    over    how a gauge of several gateways becomes one: the sum, the least or the most of them
    bounds  upper bounds of a histogram's buckets, in `unit`
    """

    name: str
    kind: Kind
    unit: str
    text: str
    labels: Labels = ()
    over: Literal["sum", "min", "max"] = "sum"
    bounds: tuple[float, ...] = ()


FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
TOKEN_S = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0),
)
TOKENS = tuple(float(d * 10**n) for n in range(6) for d in (1, 2, 5))


def _counter(name: str, unit: str, text: str, *labels: str) -> MetricSpec:
    return MetricSpec(name=f"raymoe_{name}", kind="counter", unit=unit, text=text, labels=labels)


def _gauge(
    name: str, unit: str, text: str, *labels: str, over: Literal["sum", "min", "max"] = "max"
) -> MetricSpec:
    return MetricSpec(
        name=f"raymoe_{name}", kind="gauge", unit=unit, text=text, labels=labels, over=over
    )


def _histogram(name: str, unit: str, text: str, bounds: tuple[float, ...]) -> MetricSpec:
    return MetricSpec(name=f"raymoe_{name}", kind="histogram", unit=unit, text=text, bounds=bounds)


SERVING = (
    _counter("http_requests_total", "requests", "HTTP requests.", "route", "status"),
    _counter(
        "request_success_total",
        "outputs",
        "Outputs by how they ended: stop, length, or abort (the client went away, or an error).",
        "finished_reason",
    ),
    _counter("prompt_tokens_total", "tokens", "Prompt tokens of accepted requests."),
    _counter("generation_tokens_total", "tokens", "Tokens generated."),
    _histogram(
        "time_to_first_token_seconds", "s", "From a request to its first token.", FIRST_TOKEN_S
    ),
    _histogram(
        "time_per_output_token_seconds",
        "s",
        "Mean time between the tokens of a request, one value a request.",
        TOKEN_S,
    ),
    _histogram(
        "inter_token_latency_seconds",
        "s",
        "Time between two deliveries of tokens of one output, one value a delivery.",
        TOKEN_S,
    ),
    _histogram("e2e_request_latency_seconds", "s", "From a request to its last token.", REQUEST_S),
    _histogram("request_prompt_tokens", "tokens", "Prompt tokens of a finished request.", TOKENS),
    _histogram(
        "request_generation_tokens", "tokens", "Tokens generated for a finished request.", TOKENS
    ),
    _gauge("num_requests_running", "requests", "Requests in the batches of all routers."),
    _gauge("num_requests_waiting", "requests", "Requests waiting at all routers."),
    _gauge(
        "gateway_requests_in_flight", "outputs", "Outputs being generated for gateways.", over="sum"
    ),
    _counter("gateway_resubmitted_total", "outputs", "Outputs that went on at another router."),
    _gauge(
        "gateway_routers", "routers", "Routers connected, at the gateway with fewest.", over="min"
    ),
    _gauge("router_requests_running", "requests", "Requests in a router's batch.", "router"),
    _gauge("router_requests_waiting", "requests", "Requests waiting at a router.", "router"),
)
ROUTERS = (
    _gauge("kv_cache_usage_perc", "1 = full", "Part of the KV blocks in use.", "router"),
    _counter(
        "prefix_cache_queries_total", "tokens", "Prompt tokens looked up in the cache.", "router"
    ),
    _counter("prefix_cache_hits_total", "tokens", "Of those, found there.", "router"),
    _counter("num_preemptions_total", "requests", "Requests that lost their KV blocks.", "router"),
    _counter("engine_steps_total", "steps", "Forwards of the engine.", "router"),
    _counter(
        "engine_seconds_total",
        "s",
        "Time of the engine's thread by part: plan, forward (with dispatch, wait and combine), "
        "sample, stalled (experts were away).",
        "router",
        "part",
    ),
    _counter(
        "dispatch_seconds_total",
        "s",
        "Of the forwards: dispatch (choosing replicas, sending), wait (for groups), combine.",
        "router",
        "part",
    ),
    _counter(
        "router_retried_pairs_total",
        "pairs",
        "Retries: pairs that went to another replica within their layer.",
        "router",
    ),
    _counter(
        "router_nacks_total",
        "messages",
        "Messages refused by a group without the experts asked for.",
        "router",
    ),
    _counter(
        "router_errors_total", "messages", "Messages a group answered with an error.", "router"
    ),
    _counter(
        "router_deadlines_total",
        "links",
        "Failovers: links given up because a group did not answer in time.",
        "router",
    ),
    _counter(
        "router_links_lost_total", "links", "Failovers: links to groups that were lost.", "router"
    ),
)
PLACEMENT = (
    _gauge("controller_up", "0 or 1", "1 when the placement controller answers."),
    _gauge("epoch", "", "Epoch of the placement table."),
    _gauge("term", "", "Term of the controller: how many there have been."),
    _gauge("ready", "0 or 1", "1 when every expert has a ready replica."),
    _gauge(
        "balancedness", "1 = perfect", "Ideal time of the load over that of the slowest groups."
    ),
    _gauge("layer_balancedness", "1 = perfect", "The same of one MoE layer.", "layer"),
    _gauge("group_up", "0 or 1", "1 when the group has all its experts.", "group"),
    _counter("group_deaths_total", "lives", "Lives of the group that have ended.", "group"),
    _gauge("group_memory_bytes", "bytes", "Bytes of experts it may hold.", "group"),
    _gauge("group_resident_bytes", "bytes", "Bytes of the experts it holds.", "group"),
    _gauge("group_replicas", "replicas", "Experts that it holds.", "group"),
    _gauge("group_speed", "1 = fastest", "Speed relative to the fastest group's.", "group"),
    _gauge("group_load", "pairs/s", "Load of its replicas, by their shares.", "group"),
    _gauge("group_queued_pairs", "pairs", "Pairs waiting at it when last asked.", "group"),
    _counter("group_messages_total", "messages", "Messages it answered, all routers'.", "group"),
    _counter(
        "group_latency_seconds_total",
        "s",
        "From sending a message to its answer, summed: over messages, its latency.",
        "group",
    ),
    _counter("replicas_added_total", "replicas", "Replicas that joined the table.", "group"),
    _counter("replicas_dropped_total", "replicas", "Replicas that left the table.", "group"),
    _counter(
        "migrations_total",
        "replicas",
        "Replicas brought to a group, from another group or from the checkpoint.",
        "source",
    ),
    _counter("migrated_bytes_total", "bytes", "Bytes of those.", "source"),
    _counter("migration_seconds_total", "s", "From asking for replicas to their arrival, summed."),
    _counter("migrations_failed_total", "replicas", "Replicas that could not be brought."),
    _counter("plans_total", "plans", "Plans that changed something, by their cause.", "trigger"),
    _gauge("plan_seconds", "s", "Loading time the last plan asked for."),
    _gauge("plan_gain_predicted", "part", "Part of the layers' time the last plan was to save."),
    _gauge("plan_gain_realised", "part", "The same, from the counts after the last judged plan."),
)
ON_DEMAND = (
    _gauge("expert_load", "pairs/s", "Smoothed load of an expert.", "layer", "expert"),
    _gauge("expert_replicas", "replicas", "Ready replicas of an expert.", "layer", "expert"),
)
GROUPS = (
    ("Serving", SERVING),
    ("Routers", ROUTERS),
    ("Placement", PLACEMENT),
    ("On demand: `/metrics?experts=1`", ON_DEMAND),
)
CATALOGUE = {spec.name: spec for _, specs in GROUPS for spec in specs}
