"""What is shown of a deployment: names of metrics, counters over gateways, events, history."""
