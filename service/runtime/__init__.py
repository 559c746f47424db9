"""What all I/O uses: logs, metrics, tasks, the terminal."""
