"""A client that is nothing but a socket: what a NATS client of any language sees of a natsync stream."""

import socket
from collections.abc import Callable
from urllib.parse import urlsplit

END = b"__STREAM_END__"

#: Shows one line of the conversation: `<` from the server, `>` to it.
Show = Callable[[str, str], None]


def read_stream(url: str, subject: str, payload: str, show: Show) -> list[bytes]:
    """Ask for a stream and return its chunks, showing every line that crosses the wire."""
    address = (urlsplit(url).hostname or "127.0.0.1", urlsplit(url).port or 4222)
    with socket.create_connection(address, timeout=5) as sock, sock.makefile("rb") as incoming:

        def send(*lines: str) -> None:
            for line in lines:
                show(">", line)
            sock.sendall("".join(line + "\r\n" for line in lines).encode())

        show("<", incoming.readline().decode().strip())
        send(
            'CONNECT {"verbose":false,"pedantic":false}',
            "SUB my.inbox 1",
            f"PUB {subject} my.inbox {len(payload)}",
            payload,
        )
        chunks: list[bytes] = []
        while True:
            line = incoming.readline().decode().strip()
            if line.startswith("MSG"):
                chunk = incoming.read(int(line.split()[-1]) + 2)[:-2]
                show("<", line)
                show("<", chunk.decode())
                if chunk == END:
                    return chunks
                chunks.append(chunk)
            elif line == "PING":
                sock.sendall(b"PONG\r\n")
            elif line.startswith("-ERR") or not line:
                raise ConnectionError(f"the server said {line!r}")
