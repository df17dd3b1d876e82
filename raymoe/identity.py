"""What every process of one deployment must agree on before it exchanges a byte."""

from __future__ import annotations

from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig
from raymoe.links.handshake import Identity


def identity_of(config: DeploymentConfig, spec: ModelSpec) -> Identity:
    """Deployment, model and wire format, as the handshakes compare them."""
    return Identity(
        deployment=config.name,
        fingerprint=spec.fingerprint,
        wire_dtype=config.data_plane.wire_dtype,
        hidden=spec.hidden,
    )
