"""The simulator on a socket: the organisation, its API and the control routes."""

import contextlib
from collections.abc import AsyncIterator
from functools import cache, partial
from typing import cast

from litestar.types import ASGIApp, HTTPScope, Receive, Scope, Send

from service.simulator.api import SyncApi
from service.simulator.control import control_app
from service.simulator.organisation import Organisation
from service.simulator.server import listen
from service.simulator.wire import is_loopback


class Simulator(Organisation):
    """A simulator of https://api.sync.so, on a real socket of the running loop.

        simulator = Simulator(api_key="sk-sim", webhook_secret="whsec_sim", seed=0)
        async with simulator.serve() as url:
            generation = simulator.add(faults={"DELETE": ["409", "500"]})

    It can be served again after a stop, and keeps its state.
    """

    @contextlib.asynccontextmanager
    async def serve(self, *, host: str = "127.0.0.1", port: int = 0, allow_remote: bool = False) -> AsyncIterator[str]:
        """Listen until the block ends and yield the URL.

        Raises: ValueError for a *host* that other machines can reach, unless *allow_remote*.
        """
        if not is_loopback(host) and not allow_remote:
            raise ValueError(f"the simulator is a development tool and listens on loopback only, not on {host}")
        async with listen(self._app(), host=host, port=port) as self.url:
            try:
                yield self.url
            finally:
                await self.quiesce()

    def _app(self) -> ASGIApp:
        api = SyncApi(self)
        control = cache(partial(control_app, self))  # made on demand: it takes 80 ms

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            request = cast("HTTPScope", scope)  # the server has no websockets and no lifespan
            if request["raw_path"] == b"/simulator" or request["raw_path"].startswith(b"/simulator/"):
                await control()(scope, receive, send)
            else:
                await api.handle(request, receive, send)

        return app
