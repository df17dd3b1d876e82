"""Between the controller and the clients: tables one way, counts, timings and acks the other."""

from raymoe.control.client import ControlClient
from raymoe.control.messages import ClientReport
from raymoe.control.server import ControlServer

__all__ = ["ClientReport", "ControlClient", "ControlServer"]
