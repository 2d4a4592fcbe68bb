"""A chat page: tokens appear as a third party makes them, and stop when the reader stops or closes the tab.

    cd examples/flask_chat
    natsync server &                               # or any nats-server; NATS_URL says where
    python token_api.py &                          # the third party: an HTTP service that makes up tokens
    natsync serve worker &                         # reads its tokens and streams them over NATS
    gunicorn --config ../gunicorn.conf.py app:app  # or: flask run

and open http://127.0.0.1:8000. Needs natsync[cli,flask,server], gunicorn, requests. Configuration comes from the
environment as Flask has it: FLASK_CHAT_HEARTBEAT=5, or FLASK_NATSYNC_RESUME_GRACE=3 for a worker that is given up after
three seconds of silence.
"""

import flask

from natsync.contrib.flask import NatSync, sse_response

nats = NatSync()  # for whatever application create_app() makes: opens nothing, so --preload may import it
pages = flask.Blueprint("pages", __name__)


@pages.get("/")
def chat():
    return flask.render_template("chat.html")


@pages.get("/tokens")
def tokens():
    """What the page's EventSource reads."""
    question = {"prompt": flask.request.args["prompt"], "pause": flask.request.args.get("pause", 0.2, type=float)}
    config = flask.current_app.config
    return sse_response(
        nats.stream("chat.tokens", json=question, timeout=300),
        heartbeat=config["CHAT_HEARTBEAT"],
        event="token",
        look=config["CHAT_LOOK"],
    )


def create_app(**config):
    app = flask.Flask(__name__)
    app.config.from_mapping(CHAT_HEARTBEAT=15, CHAT_LOOK=True)
    app.config.from_prefixed_env()
    app.config.from_mapping(config)
    nats.init_app(app)
    app.register_blueprint(pages)
    return app


app = create_app()
