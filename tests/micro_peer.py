"""A micro service (ADR-32) by nats-py, as a process of its own: micro_peer.py URL NAME."""

import asyncio
import sys

import nats
from nats.micro import add_service
from nats.micro.request import Request


async def main(url: str, name: str) -> None:
    async def echo(request: Request) -> None:
        await request.respond(request.data)

    async def fail(request: Request) -> None:
        raise RuntimeError("never works")

    connection = await nats.connect(url)
    service = await add_service(connection, name=name, version="1.2.3", description="an echo")
    await service.add_endpoint(name="echo", subject=f"{name}.echo", handler=echo)
    await service.add_endpoint(name="fail", subject=f"{name}.fail", handler=fail)
    await connection.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
