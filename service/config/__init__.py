"""The environment read into settings."""
