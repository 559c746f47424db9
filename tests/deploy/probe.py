"""What compose and Kubernetes ask to learn whether a worker lives: as `mayfly worker --check`, but in shell."""

from workers import reconcile

_MINUTES = int(reconcile.ALIVE_WITHIN.total_seconds() / 60)
WORKER_IS_ALIVE = f"find /data/mayfly/{reconcile._HEARTBEAT} -mmin -{_MINUTES}"
