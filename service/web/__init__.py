"""HTTP in: the webhook, the operator API, health and metrics."""
