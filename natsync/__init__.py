"""natsync: NATS for blocking Python. Publish, request and stream from threads, scripts, Flask and Django.

import natsync

with natsync.Client("nats://127.0.0.1:4222") as client:
    for chunk in client.stream("llm.chat", "why is the sky blue?"):
        print(chunk.decode(), end="", flush=True)
"""

import importlib
from typing import TYPE_CHECKING

from natsync._version import __version__
from natsync.client import Client, connect
from natsync.context import Context
from natsync.errors import (
    AuthorizationError,
    Cancelled,
    ClientLost,
    Code,
    ConnectError,
    ConnectionClosed,
    ConnectionLost,
    DeadlineExceeded,
    DrainTimeout,
    ForkError,
    HandlerError,
    IdleTimeout,
    InvalidArgument,
    InvalidURL,
    MaxPayloadExceeded,
    NatsError,
    NoRespondersError,
    NoServersError,
    PermissionDenied,
    PoolClosed,
    PoolTimeout,
    PoolUnreachable,
    ProtocolError,
    ReconnectBufferFull,
    RequestTimeout,
    ServerLost,
    SlowConsumerError,
    StreamCancelled,
    StreamClosed,
    StreamEnded,
    StreamError,
    StreamRefused,
    TimedOut,
)
from natsync.headers import Headers
from natsync.hooks import Exchange, Hooks
from natsync.message import Message
from natsync.middleware import Middleware, Passage
from natsync.options import ConnectOptions, Sentinels
from natsync.pool import ConnectionPool
from natsync.replies import Replies
from natsync.retry import Retry
from natsync.streaming.handlers import HandlerContext
from natsync.streaming.registration import Handle
from natsync.streaming.sender import ResponseSender
from natsync.streaming.stream import Stream
from natsync.streaming.subscriber import Subscriber
from natsync.subscription import Subscription

__all__ = [
    "AuthorizationError",
    "Cancelled",
    "Client",
    "ClientLost",
    "Code",
    "ConnectError",
    "ConnectOptions",
    "ConnectionClosed",
    "ConnectionLost",
    "ConnectionPool",
    "Context",
    "DeadlineExceeded",
    "DrainTimeout",
    "Exchange",
    "ForkError",
    "Handle",
    "HandlerContext",
    "HandlerError",
    "Headers",
    "Hooks",
    "IdleTimeout",
    "InvalidArgument",
    "InvalidURL",
    "MaxPayloadExceeded",
    "Message",
    "Middleware",
    "NatsError",
    "NoRespondersError",
    "NoServersError",
    "Passage",
    "PermissionDenied",
    "PoolClosed",
    "PoolTimeout",
    "PoolUnreachable",
    "ProtocolError",
    "ReconnectBufferFull",
    "Replies",
    "RequestTimeout",
    "ResponseSender",
    "Retry",
    "Sentinels",
    "ServerLost",
    "SlowConsumerError",
    "Stream",
    "StreamCancelled",
    "StreamClosed",
    "StreamEnded",
    "StreamError",
    "StreamRefused",
    "Subscriber",
    "Subscription",
    "TimedOut",
    "__version__",
    "connect",
]


if TYPE_CHECKING:  # checkers are told of the two; to them a __getattr__ would stand for any name at all
    from natsync import monitor as monitor
    from natsync import testing as testing
else:

    def __getattr__(name: str) -> object:
        """natsync.testing and natsync.monitor without an import of their own; the core never loads them."""
        if name in ("testing", "monitor"):
            return importlib.import_module(f"natsync.{name}")
        raise AttributeError(f"module 'natsync' has no attribute {name!r}")
