"""What a gateway counts: requests, tokens, times, and the routers it sees."""

from __future__ import annotations

from raymoe.gateway.backend import Backend
from raymoe.gateway.metrics import Labels, Registry


class GatewayMetrics:
    """The metrics by their names, all prefixed raymoe_."""

    def __init__(self, backend: Backend) -> None:
        self.registry = registry = Registry()
        self.requests = registry.counter(
            "raymoe_http_requests_total", "HTTP requests by route and status.", ("route", "status")
        )
        self.finished = registry.counter(
            "raymoe_choices_finished_total", "Outputs by the way they ended.", ("reason",)
        )
        self.prompt_tokens = registry.counter(
            "raymoe_prompt_tokens_total", "Prompt tokens of accepted requests."
        )
        self.generation_tokens = registry.counter(
            "raymoe_generation_tokens_total", "Tokens generated."
        )
        self.first_token_s = registry.histogram(
            "raymoe_time_to_first_token_seconds", "From the request to its first token."
        )
        self.per_token_s = registry.histogram(
            "raymoe_time_per_output_token_seconds", "Mean time between tokens, per request."
        )
        self.request_s = registry.histogram(
            "raymoe_request_duration_seconds", "From the request to its last token."
        )
        registry.reading(
            "raymoe_gateway_requests_in_flight",
            "Outputs being generated for this gateway.",
            lambda: {(): backend.in_flight},
        )
        registry.reading(
            "raymoe_gateway_resubmitted_total",
            "Outputs that went on at another router.",
            lambda: {(): backend.resubmitted},
            kind="counter",
        )
        registry.reading(
            "raymoe_gateway_routers",
            "Routers connected to this gateway.",
            lambda: {(): len(backend.routers())},
        )
        for name in ("running", "waiting"):
            registry.reading(
                f"raymoe_router_requests_{name}",
                f"Requests {name} at a router, of all gateways.",
                lambda name=name: self._loads(name),  # type: ignore[misc]
                ("router",),
            )
        self._backend = backend

    def _loads(self, name: str) -> dict[Labels, float]:
        return {
            (router.router_id,): getattr(router.load, name) for router in self._backend.routers()
        }
