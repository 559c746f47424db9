"""A simulator of the sync.so API v2, for the demo, tests and benchmarks.

It imports nothing from Mayfly except the signing of webhooks, so that it does not repeat an error of Mayfly's client.
No production command uses it, and it names itself in each ``Server`` header.
"""

from service.simulator.calls import Call, Operation
from service.simulator.faults import Fault, FaultName
from service.simulator.generation import Generation
from service.simulator.organisation import Delivery
from service.simulator.samples import serve_forever
from service.simulator.simulator import Simulator

__all__ = ["Call", "Delivery", "Fault", "FaultName", "Generation", "Operation", "Simulator", "serve_forever"]
