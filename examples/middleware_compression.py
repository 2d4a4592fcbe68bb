"""Middleware that compresses requests, replies, messages and every chunk of a stream, for peers that can read it.

    natsync server &                  # or any nats-server
    python examples/middleware_compression.py

A requester says in Accept-Encoding that it can read compressed answers; a peer without this middleware gets plain ones.
Whether something is compressed is in Content-Encoding: of the request, the reply, or a stream's first chunk.
"""

import zlib

import natsync

#: Shorter requests and messages are sent as they are. Chunks of a stream all go the same way.
LEAST_BYTES = 200
#: No payload may become larger than this: a small one that unpacks into gigabytes is refused.
MOST_BYTES = 64 << 20


class Compression(natsync.Middleware):
    def send(self, passage, data):
        if passage.side == "requester":
            passage.headers["Accept-Encoding"] = "deflate"
            if len(data) < LEAST_BYTES:
                return data
            passage.headers["Content-Encoding"] = "deflate"
        elif passage.headers.get("Accept-Encoding") == "deflate":
            passage.reply_headers["Content-Encoding"] = "deflate"
        else:
            return data
        return zlib.compress(data)

    def receive(self, passage, data):
        headers = passage.reply_headers if passage.side == "requester" else passage.headers
        if headers.get("Content-Encoding") != "deflate":
            return data
        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(data, MOST_BYTES)
        except zlib.error as error:
            raise natsync.InvalidArgument(f"the payload cannot be unpacked: {error}") from error
        if not unpacker.eof:
            raise natsync.InvalidArgument(f"the payload is cut off, or unpacks into more than {MOST_BYTES} bytes")
        return unpacked


subscriber = natsync.Subscriber(middleware=[Compression()])


@subscriber.stream("repeat", queue="repeaters")
def repeat(ctx, request):
    for _ in range(3):
        yield request.data * 10


def main():
    text = b"all work and no play " * 50
    with subscriber, natsync.Client(middleware=[Compression()]) as client, natsync.Client() as plain:
        with client.stream("repeat", text, timeout=5) as stream:
            sizes = [len(chunk) for chunk in stream]
        print("chunks of", sizes, "bytes, of which", int(stream.stats["bytes"]), "were on the wire")
        with plain.stream("repeat", text, timeout=5) as stream:
            sizes = [len(chunk) for chunk in stream]
        print("chunks of", sizes, "bytes, of which", int(stream.stats["bytes"]), "were on the wire")


if __name__ == "__main__":
    main()
