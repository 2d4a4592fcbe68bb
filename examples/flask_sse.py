"""Server-sent events in Flask: each chunk of a natsync stream becomes an event in the browser.

    cd examples
    natsync serve worker &            # answers words.upper
    flask --app flask_sse run
    curl -N "http://127.0.0.1:5000/upper?text=one+piece+after+the+other"

Needs natsync[flask]. A threaded WSGI server spends one thread on each open stream. When the browser leaves, the stream
is closed, and the handler stops. A whole page is in flask_chat/.
"""

from flask import Flask, request

from natsync.contrib.flask import NatSync, sse_response

app = Flask(__name__)
nats = NatSync(app)  # app.config["NATSYNC_URL"], NATS_URL or localhost; connects at the first request


@app.get("/upper")
def upper():
    return sse_response(nats.stream("words.upper", request.args["text"], idle_timeout=30))
