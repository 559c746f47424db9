"""The ground under all I/O: logs, metrics, tasks, the terminal."""
