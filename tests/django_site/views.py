"""Views with streams, and one that tells what they have left behind."""

import gc
import os
import threading

from django.http import HttpRequest, JsonResponse, StreamingHttpResponse

from natsync.contrib.django import client, sse_response, stream_response
from natsync.streaming.stream import Stream


def opened(request: HttpRequest, subject: str):
    return client.stream(subject, request.GET.get("payload", ""), idle_timeout=60)


def stream(request: HttpRequest, subject: str):
    heartbeat = float(request.GET.get("heartbeat", "15"))
    return sse_response(opened(request, subject), heartbeat=heartbeat)


def unseen(request: HttpRequest, subject: str):
    """Without heartbeats or a look at the socket: only a failed write tells that the browser has left."""
    return sse_response(opened(request, subject), heartbeat=None, request=HttpRequest())


def plain(request: HttpRequest, subject: str):
    return stream_response(opened(request, subject), "text/plain")


def generator(request: HttpRequest, subject: str):
    """Django alone: a stream is closed because it has close()."""
    return StreamingHttpResponse(opened(request, subject), content_type="text/plain")


def raises(request: HttpRequest, subject: str):
    response = sse_response(opened(request, subject))
    raise RuntimeError(f"after {response!r} was made")


def request(request: HttpRequest, subject: str):
    reply = client.request(subject, request.GET.get("payload", ""), timeout=float(request.GET.get("timeout", "5")))
    return JsonResponse({"reply": reply.text()})


def state(request: HttpRequest):
    """What is there now, in this process."""
    gc.collect()
    streams = [one for one in gc.get_objects() if isinstance(one, Stream)]
    return JsonResponse(
        {
            "pid": os.getpid(),
            "threads": sorted(thread.name for thread in threading.enumerate()),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "streams": len(streams),
        }
    )
