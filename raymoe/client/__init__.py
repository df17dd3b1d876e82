"""The client of the expert groups: one in every process that dispatches."""

from raymoe.client.batch import Batch
from raymoe.client.config import ClientConfig
from raymoe.client.expert_client import ExpertClient
from raymoe.client.stats import ClientStats

__all__ = ["Batch", "ClientConfig", "ClientStats", "ExpertClient"]
