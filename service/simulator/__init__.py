"""A development stand-in for the sync.so API v2: the other end of the wire for demo, tests and benchmarks.

It imports nothing of Mayfly but the signing of webhooks, so that an error in Mayfly's reading of the API is
not mirrored here. No production command uses it, and it says who it is in each ``Server`` header.
"""

from service.simulator.calls import Call, Operation
from service.simulator.faults import Fault, FaultName
from service.simulator.generation import Generation
from service.simulator.organisation import Delivery
from service.simulator.samples import serve_forever
from service.simulator.simulator import Simulator

__all__ = ["Call", "Delivery", "Fault", "FaultName", "Generation", "Operation", "Simulator", "serve_forever"]
