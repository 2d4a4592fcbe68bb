"""A stand-in for a third party that sends its answer token by token over HTTP: GET /tokens?q=question.

    python token_api.py          # says where it listens; PORT, PAUSE and TOKENS in the environment change it

It prints when a reader leaves before the end. A question with the word `think` in it gets one token, and the rest a
minute later: a model that thinks. One that begins with `fail` gets a 500.
"""

import os
import select
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from urllib.parse import parse_qs, urlsplit

PAUSE = float(os.environ.get("PAUSE", 0.1))  # seconds between two tokens
TOKENS = int(os.environ.get("TOKENS", 60))
THINKING = 60.0  # seconds


class Tokens(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        question = parse_qs(urlsplit(self.path).query).get("q", [""])[0]
        if question.startswith("fail"):
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number, word in enumerate(islice(cycle(question.split() or ["what?"]), TOKENS), 1):
            line = f"{word}-{number}\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            if self.reader_leaves_within(THINKING if "think" in question else PAUSE):
                self.close_connection = True
                print(f"{question}: the reader left after {number} tokens", flush=True)
                return
        self.wfile.write(b"0\r\n\r\n")
        print(f"{question}: all tokens read", flush=True)

    def reader_leaves_within(self, seconds):
        readable, _, _ = select.select([self.connection], [], [], seconds)
        return bool(readable)  # a reader sends nothing: what can be read is its end

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", 8000))), Tokens)
    print(f"tokens at http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()
