"""Retry: a handler that is not ready yet, and a client that tries again with growing pauses.

    natsync server &                  # or any nats-server
    python examples/retry.py

A cancel or a deadline is never retried. A request that may have run is repeated only where the policy says
that running twice does no harm (idempotent=True).
"""

import natsync

subscriber = natsync.Subscriber()
tries = []


@subscriber.handler("report")
def report(ctx, request):
    tries.append(request)
    if len(tries) < 3:
        raise RuntimeError("still warming up")
    return "the report"


def main():
    retry = natsync.Retry(attempts=4, initial=0.05, idempotent=True)
    with subscriber, natsync.Client() as client:
        reply = client.request("report", timeout=5, retry=retry)
    print(f"{reply.text()}, after {len(tries)} tries")


if __name__ == "__main__":
    main()
