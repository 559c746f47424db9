"""What the commands of `mayfly` do, one module per kind; service.cli names them and loads only the one that runs."""
