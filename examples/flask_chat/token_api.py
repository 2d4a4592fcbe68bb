"""The chat's third party: an HTTP service that answers a prompt token by token, each after a pause. It knows no NATS.

    python token_api.py [port]

POST /tokens {"prompt": text, "pause": seconds}: a token a line; a prompt "count 20" is answered by 20 numbers, "fail"
by a 500, anything else by its words in capitals. GET /readers: who reads now, and when those left who did not wait for
the end (JSON: time.time() by prompt).
"""

import json
import select
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

reading: list[str] = []
left: dict[str, float] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps({"reading": reading, "left": left}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, pause = question["prompt"], float(question["pause"])
        if prompt == "fail":
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        reading.append(prompt)
        try:
            self.answer(words(prompt), pause)
        except OSError:  # the reader has left
            left[prompt] = time.time()
            self.close_connection = True
        finally:
            reading.remove(prompt)

    def answer(self, tokens: list[str], pause: float) -> None:
        for token in tokens:
            line = token.encode() + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            # A reader sends nothing behind its request: its socket becomes readable when it leaves, and only then.
            if select.select([self.connection], [], [], pause)[0]:
                raise ConnectionResetError
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing of each request."""


def words(prompt: str) -> list[str]:
    first, _, count = prompt.partition(" ")
    if first == "count" and count.split(" ")[0].isdigit():
        return [str(number) for number in range(1, int(count.split(" ")[0]) + 1)]
    return prompt.upper().split()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8001), Handler)
    server.daemon_threads = True
    print(f"tokens at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
