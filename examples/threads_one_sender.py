"""Several threads send on one stream; the handler itself returns at once, and a last thread ends the stream.

    natsync server &                  # or any nats-server
    python examples/threads_one_sender.py

A sender may be used from any number of threads. A stream whose handler takes a sender lasts until somebody
calls end() or send_error(), or until the client has gone.
"""

import threading

import natsync

subscriber = natsync.Subscriber()

THREADS = 4
PIECES = 5


@subscriber.stream("gather")
def gather(ctx, request, sender):
    working = [
        threading.Thread(target=produce, args=(ctx, sender, number), name=f"producer-{number}")
        for number in range(THREADS)
    ]
    for thread in working:
        thread.start()
    threading.Thread(target=finish, args=(sender, working)).start()


def produce(ctx, sender, number):
    for piece in range(PIECES):
        if ctx.wait(0.01 * (number + 1)) or sender.is_closed():
            return
        sender.send(f"thread {number} piece {piece}")


def finish(sender, working):
    for thread in working:
        thread.join()
    sender.end()


def main():
    with subscriber, natsync.Client() as client, client.stream("gather", timeout=30) as stream:
        pieces = [chunk.decode() for chunk in stream]
    print("\n".join(pieces))
    print(len(pieces), "pieces from", len({piece.split()[1] for piece in pieces}), "threads")


if __name__ == "__main__":
    main()
