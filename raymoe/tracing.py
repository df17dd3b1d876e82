"""OpenTelemetry spans of requests, when the environment names an exporter; else nothing at all.

Switched on as OpenTelemetry says: OTEL_EXPORTER_OTLP_ENDPOINT (or ..._TRACES_ENDPOINT); sampling,
headers, limits by its own variables. `pip install 'raymoe[otel]'` brings the exporter. Spans: the
request at the gateway, and under it, at the router, queue, prefill, decode and one for each group
that answered meanwhile.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from raymoe import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

log = logging.getLogger(__name__)
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """Makes spans. Times are Unix nanoseconds."""

    def __init__(self, processor: SpanProcessor, resource: Mapping[str, Any]) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        # not the global provider: that one may be Ray's, or of what we are embedded in
        self._provider = TracerProvider(resource=Resource.create(dict(resource)))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("raymoe", __version__)

    def begin(
        self,
        name: str,
        traceparent: str = "",
        *,
        kind: str = "INTERNAL",
        at_ns: int | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> Any:
        """A span under `traceparent` (W3C), or a trace of its own. End it with `end`."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(
            name,
            context=_context(traceparent),
            kind=SpanKind[kind],
            start_time=at_ns,
            attributes=dict(attributes or {}),
        )

    def add(
        self, name: str, traceparent: str, begin_ns: int, end_ns: int, **attributes: Any
    ) -> None:
        """A span that has ended already."""
        self.begin(name, traceparent, at_ns=begin_ns, attributes=attributes).end(end_ns)

    def close(self) -> None:
        """Sends what is left, within the exporter's own time limit."""
        self._provider.shutdown()


def from_environment(process: str, deployment: str) -> Tracing | None:
    """None when no exporter is configured, or it is not installed (then a line in the log)."""
    if not any(os.environ.get(name, "").strip() for name in _ENDPOINTS):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp").strip() != "otlp":
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        log.error("no traces: %s; install the exporter with pip install 'raymoe[otel]'", e)
        return None
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    if protocol != "http/protobuf":
        log.error("no traces: OTEL_EXPORTER_OTLP_PROTOCOL=%s; only http/protobuf is here", protocol)
        return None
    # OpenTelemetry's own variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES) go before these
    resource = {"raymoe.process": process, "raymoe.deployment": deployment}
    if not os.environ.get("OTEL_SERVICE_NAME"):
        resource["service.name"] = "raymoe"
    return Tracing(BatchSpanProcessor(OTLPSpanExporter()), resource)


def fail(span: Any, why: str) -> None:
    """Marks a span as failed."""
    from opentelemetry.trace import Status, StatusCode

    span.set_status(Status(StatusCode.ERROR, why))


def traceparent_of(span: Any) -> str:
    """The span as a W3C traceparent header; empty when it is not recorded."""
    context = span.get_span_context()
    if not context.is_valid or not span.is_recording():
        return ""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-01"


def trace_id_of(traceparent: str) -> str:
    """Its trace id, for log lines; empty without one."""
    return traceparent.split("-")[1] if traceparent.count("-") == 3 else ""


def _context(traceparent: str) -> Any:
    """What `traceparent` names as a parent; one that is malformed counts as none."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent}, Context())
