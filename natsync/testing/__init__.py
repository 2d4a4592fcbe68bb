"""What a test of code that speaks NATS needs: a real server, a scripted one, and a wait without guesses.

NatsServer runs the real nats-server, NatsCluster several of them, FaultProxy stands in front of one and does harm,
ScriptedPeer plays a server that misbehaves on cue, eventually() waits for a condition. Only the standard library is
imported here; the pytest fixtures are in natsync.testing.plugin.
"""

from natsync.testing.cluster import NatsCluster
from natsync.testing.peer import PeerConnection, ScriptedPeer
from natsync.testing.proxy import Direction, FaultProxy
from natsync.testing.server import NatsServer, ServerNotFound, ServerStartError, find_nats_server
from natsync.testing.waiting import eventually

__all__ = [
    "NatsServer",
    "NatsCluster",
    "ServerNotFound",
    "ServerStartError",
    "find_nats_server",
    "FaultProxy",
    "Direction",
    "ScriptedPeer",
    "PeerConnection",
    "eventually",
]
