"""How many routers Ray Serve keeps: by the requests they say they have.

Tokens do not travel through Serve's handles, so Serve sees no requests at a router. Each router
says how many it has (`record_autoscaling_stats`), and Serve asks `routers_for_load` instead of its
own policy; bounds and delays stay Serve's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from raymoe.config import RoutersConfig

REQUESTS = "raymoe_requests"  # running and waiting, as a router reports them
_REPORT_S = 10.0  # Serve's default for how often; it calls any other deprecated
_REPORTS = 3  # in a window, at least


def serve_options(routers: RoutersConfig) -> dict[str, Any]:
    """How many routers there are to be, as options of a Serve deployment."""
    wanted = routers.autoscaling
    if wanted.max_replicas is None:
        return {"num_replicas": routers.count}
    return {
        "autoscaling_config": {
            "min_replicas": wanted.min_replicas,
            "initial_replicas": routers.count,
            "max_replicas": wanted.max_replicas,
            "target_ongoing_requests": wanted.target_ongoing_requests,
            "look_back_period_s": wanted.look_back_period_s,
            "metrics_interval_s": min(_REPORT_S, wanted.look_back_period_s / _REPORTS),
            "upscale_delay_s": wanted.upscale_delay_s,
            "downscale_delay_s": wanted.downscale_delay_s,
            "policy": {"policy_function": f"{__name__}:{routers_for_load.__name__}"},
        }
    }


def routers_for_load(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Routers that have `target_ongoing_requests` each, and what Serve is to remember (nothing).

    Serve pickles this function by value, with what it uses of this file: the process of Serve's
    controller needs none of our packages. Bounds, delays and rounding up follow there.
    """
    reported = (context.aggregated_metrics or {}).get(REQUESTS, {})
    now = context.target_num_replicas
    if not reported:  # none serves yet, or Serve's controller has just been restarted
        return now, {}
    wanted = sum(reported.values()) / context.config.target_ongoing_requests
    if any(router not in reported for router in context.running_replicas):
        wanted = max(wanted, now)  # of what a router has not told it may have plenty
    return wanted, {}
