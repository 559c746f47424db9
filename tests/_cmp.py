import sys, tempfile
from dataclasses import replace
from pathlib import Path
import tests.bench.intake as I
from tests.bench import systems
node=systems.fastify_bullmq()
sy=[systems.fastapi_arq()]+([node, systems.synced(node)] if node else [])+[replace(systems.mayfly(),name="uvicorn"), replace(systems.mayfly(),name="granian",extra={"PYTHONPATH":"/tmp/w/http/build/granian"})]
with tempfile.TemporaryDirectory(prefix="mayfly-bench-") as f:
    r = I.intake(sy, Path(f), rounds=3, seconds=2.0)
    for n, by in r.items():
        for c, fig in by.items(): print(n, c, {k: round(v,1) for k,v in fig.items()}, flush=True)
