"""The commands of `mayfly`, one module per kind; service.cli loads the one that runs."""
