"""A worker: a module with a subscriber and its handlers, run until it is told to stop.

    cd examples
    natsync serve worker              # or: python worker.py
    natsync stream words.upper "one piece after the other"
    natsync request words.count "how many words are these"

SIGTERM or Ctrl-C lets running handlers finish. Start several: the queue group shares the requests among them.
"""

import natsync

subscriber = natsync.Subscriber()


@subscriber.stream("words.upper", queue="workers")
def upper(ctx, request):
    for word in request.text().split():
        yield word.upper()
        ctx.wait(0.1)  # a slow piece of work; returns early if the client goes away


@subscriber.handler("words.count", queue="workers")
def count(ctx, request):
    return {"words": len(request.text().split())}


if __name__ == "__main__":
    subscriber.serve_forever()
