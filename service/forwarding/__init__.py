"""The client of the targets that webhooks are forwarded to."""
