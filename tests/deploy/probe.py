"""The shell command with which compose and Kubernetes check a worker; equivalent to `mayfly worker --check`."""

from workers import heartbeat

WORKER_IS_ALIVE = f"find /data/mayfly/{heartbeat._FILE} -mmin -{heartbeat.ALIVE_WITHIN_SECONDS / 60:.0f}"
