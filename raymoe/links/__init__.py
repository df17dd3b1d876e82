"""The data plane between clients and expert groups: one protocol, several transports."""
