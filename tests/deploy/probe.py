"""What compose and Kubernetes ask to learn whether a worker lives: as `mayfly worker --check`, but in shell."""

from workers import heartbeat

WORKER_IS_ALIVE = f"find /data/mayfly/{heartbeat._FILE} -mmin -{heartbeat.ALIVE_WITHIN_SECONDS / 60:.0f}"
