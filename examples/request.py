"""Request and reply: a handler answers, a client asks, and a handler's exception arrives as an error.

    natsync server &                  # or any nats-server
    python examples/request.py

The server is taken from NATS_URL, or is the one on this machine.
"""

import natsync

subscriber = natsync.Subscriber()


@subscriber.handler("sum", queue="calculators")
def add(ctx, request):
    numbers = request.json()
    return {"sum": numbers["a"] + numbers["b"]}


def main():
    with subscriber, natsync.Client() as client:
        reply = client.request("sum", json={"a": 20, "b": 22}, timeout=5)
        print("20 + 22 =", reply.json()["sum"])

        try:
            client.request("sum", json={"a": 20}, timeout=5)
        except natsync.HandlerError as error:
            print("without b:", error)

        try:
            client.request("product", timeout=5)
        except natsync.NoRespondersError as error:
            print("elsewhere:", error)


if __name__ == "__main__":
    main()
