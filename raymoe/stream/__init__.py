"""The persistent connection between a gateway and a router: requests in, token ids out.

One connection a pair; one frame an engine step carries the new tokens of all that gateway's
requests. `StreamServer` lives in the router process (own thread, never blocks the engine),
`StreamClient` in the gateway's event loop.
"""

from raymoe.stream.client import StreamClient
from raymoe.stream.messages import Hello, Load, ModelInfo, StreamEndpoint
from raymoe.stream.server import StreamConfig, StreamServer

__all__ = [
    "Hello",
    "Load",
    "ModelInfo",
    "StreamClient",
    "StreamConfig",
    "StreamEndpoint",
    "StreamServer",
]
