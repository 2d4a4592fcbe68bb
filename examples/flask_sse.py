"""Server-sent events in Flask: each chunk of a natsync stream becomes an event in the browser.

    cd examples
    natsync serve worker &            # answers words.upper
    flask --app flask_sse run
    curl -N "http://127.0.0.1:5000/upper?text=one+piece+after+the+other"

Needs flask. A threaded WSGI server spends one thread on each open stream. When the browser leaves, the server
closes the response's iterable, which is the stream: that cancels it, and the handler stops.
"""

from flask import Flask, Response, request

import natsync

app = Flask(__name__)
client = natsync.Client()  # connects at the first request; one for all threads of the process


@app.get("/upper")
def upper():
    stream = client.stream("words.upper", request.args["text"], idle_timeout=30)
    # stream.map() and not a generator around the stream: it keeps the stream's close().
    return Response(stream.map(event), mimetype="text/event-stream")


def event(chunk):
    lines = chunk.split(b"\n")  # an event's data may not have line breaks of its own
    return b"".join(b"data: " + line + b"\n" for line in lines) + b"\n"
