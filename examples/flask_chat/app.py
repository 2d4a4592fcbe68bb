"""A chat page: each question is an EventSource, each answer a stream of natsync.

    cd examples/flask_chat
    python token_api.py &
    natsync serve worker &
    gunicorn --config ../gunicorn.conf.py app:app     # or: flask run --port 8080

and open http://127.0.0.1:8080/ in several tabs. FLASK_NATSYNC_URL and other options come from the environment;
FLASK_CHAT_HEARTBEAT and FLASK_CHAT_LOOK are what sse_response() takes.
"""

from flask import Flask, render_template, request

from natsync.contrib.flask import NatSync, sse_response

app = Flask(__name__)
app.config.from_mapping(CHAT_HEARTBEAT=15, CHAT_LOOK=True)
app.config.from_prefixed_env()
nats = NatSync(app)  # no socket and no thread before the first question, so gunicorn may fork after this


@app.get("/")
def page():
    return render_template("chat.html")


@app.get("/ask")
def ask():
    stream = nats.stream("chat.ask", request.args["q"])
    return sse_response(stream, heartbeat=app.config["CHAT_HEARTBEAT"], look=app.config["CHAT_LOOK"])
