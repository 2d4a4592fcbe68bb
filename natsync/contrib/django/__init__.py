"""natsync in Django: settings, one client per process, handlers of apps, a worker, server-sent events.

    INSTALLED_APPS = [..., "natsync.contrib.django"]
    NATSYNC = {"URL": "nats://127.0.0.1:4222", "NAME": "shop"}

In views, `client` is the process's Client; `sse_response(stream)` turns a stream into events. In an app's handlers.py,
`subscriber` has the decorators; `manage.py natsync_worker` serves what they registered. docs/django.md tells it all.

Importing this opens nothing and starts no thread; the first use of the client does.
"""

try:
    import django as _django  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "django":
        raise
    raise ModuleNotFoundError(
        'natsync.contrib.django needs Django: pip install "natsync[django]"', name="django"
    ) from None

from natsync.contrib.django.clients import client, close_client, get_client
from natsync.contrib.django.registry import Registry, autodiscover, subscriber
from natsync.contrib.django.sse import sse_response, stream_response

__all__ = [
    "client",
    "get_client",
    "close_client",
    "subscriber",
    "Registry",
    "autodiscover",
    "sse_response",
    "stream_response",
]
