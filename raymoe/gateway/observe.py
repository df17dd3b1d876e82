"""What a gateway counts: requests, tokens, times, and the routers it sees."""

from __future__ import annotations

from raymoe.gateway.backend import Backend
from raymoe.gateway.metrics import Registry
from raymoe.observe.catalogue import Labels


class GatewayMetrics:
    """The gateway's metrics; `raymoe.observe.catalogue` says what they are."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.registry = registry = Registry()
        self.requests = registry.counter("http_requests_total")
        self.finished = registry.counter("request_success_total")
        self.prompt_tokens = registry.counter("prompt_tokens_total")
        self.generation_tokens = registry.counter("generation_tokens_total")
        self.first_token_s = registry.histogram("time_to_first_token_seconds")
        self.per_token_s = registry.histogram("time_per_output_token_seconds")
        self.between_tokens_s = registry.histogram("inter_token_latency_seconds")
        self.request_s = registry.histogram("e2e_request_latency_seconds")
        self.request_prompt_tokens = registry.histogram("request_prompt_tokens")
        self.request_generation_tokens = registry.histogram("request_generation_tokens")
        registry.reading("gateway_requests_in_flight", lambda: {(): backend.in_flight})
        registry.reading("gateway_resubmitted_total", lambda: {(): backend.resubmitted})
        registry.reading("gateway_routers", lambda: {(): len(backend.routers())})
        for name in ("running", "waiting"):
            registry.reading(
                f"num_requests_{name}",
                lambda name=name: self._sum_of_loads(name),  # type: ignore[misc]
            )
            registry.reading(
                f"router_requests_{name}",
                lambda name=name: self._loads(name),  # type: ignore[misc]
            )

    def _sum_of_loads(self, name: str) -> dict[Labels, float]:
        return {(): sum(self._loads(name).values())}

    def _loads(self, name: str) -> dict[Labels, float]:
        return {
            (router.router_id,): getattr(router.load, name) for router in self._backend.routers()
        }
