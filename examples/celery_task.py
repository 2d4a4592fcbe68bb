"""A Celery task that reads a stream: one client for each process of a prefork worker.

    python celery_task.py                             # runs the task here, without a broker
    celery --app celery_task worker --concurrency 2   # with a broker of your own: CELERY_BROKER_URL

Needs celery, a nats-server (NATS_URL) and a responder for words.upper: `natsync serve worker` beside this file. Celery
forks its processes after this module is imported; the client opens nothing before the first task, so each has its own.
"""

import json
import os

from celery import Celery

import natsync

app = Celery("celery_task", broker=os.environ.get("CELERY_BROKER_URL", "memory://"))
app.conf.update(
    result_backend=os.environ.get("CELERY_RESULT_BACKEND", "cache+memory://"),
    broker_transport_options=json.loads(os.environ.get("CELERY_TRANSPORT_OPTIONS", "{}")),
)
client = natsync.Client(name="celery")


@app.task(autoretry_for=(natsync.NoRespondersError, natsync.StreamRefused), max_retries=3, default_retry_delay=1)
def upper(text):
    """The words of the text in capitals, as the responder sends them one after the other."""
    # Leaving the block cancels the stream: on an error, and when a time limit of Celery's is raised in here.
    with client.stream("words.upper", text, timeout=60) as stream:
        return {"pid": os.getpid(), "words": [chunk.decode() for chunk in stream]}


if __name__ == "__main__":
    print(*upper.apply(args=["one piece after the other"]).get()["words"])
