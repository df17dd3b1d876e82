"""The OpenAI-compatible endpoint: text and HTTP on one side, token ids and routers on the other.

create_app(RouterPool(discover, ...), GatewayTokenizer.load(path), AppConfig(...))
"""

from raymoe.gateway.app import AppConfig, create_app
from raymoe.gateway.backend import Backend
from raymoe.gateway.pool import PoolConfig, RouterPool
from raymoe.gateway.tokenizer import GatewayTokenizer

__all__ = ["AppConfig", "Backend", "GatewayTokenizer", "PoolConfig", "RouterPool", "create_app"]
