"""The HTTP server: the webhook, the operator API, health and metrics."""
