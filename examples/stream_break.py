"""A client that leaves a stream early; the handler is told and stops.

    natsync server &                  # or any nats-server
    python examples/stream_break.py

Leaving the `with` block cancels a stream that has not ended. The handler below would count for ever.
"""

import itertools
import threading

import natsync

subscriber = natsync.Subscriber()
stopped = threading.Event()


@subscriber.stream("count")
def count(ctx, request):
    try:
        for number in itertools.count(int(request.data)):
            yield str(number)
            if ctx.wait(0.02):
                return
    finally:
        stopped.set()


def main():
    with subscriber, natsync.Client() as client:
        with client.stream("count", "10") as stream:
            for chunk in stream:
                print("got", chunk.decode())
                if chunk == b"14":
                    break
        print("the handler has stopped:", stopped.wait(5))


if __name__ == "__main__":
    main()
