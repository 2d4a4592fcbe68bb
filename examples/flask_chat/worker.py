"""Answers chat.ask with the tokens of a third party, and stops reading them the moment nobody wants them any more.

    TOKEN_API=http://127.0.0.1:8000 natsync serve worker

Needs requests. ctx.closing() is what wakes a read that is blocked in the third party.
"""

import os

import requests

import natsync

TOKEN_API = os.environ.get("TOKEN_API", "http://127.0.0.1:8000")

subscriber = natsync.Subscriber()


@subscriber.stream("chat.ask", queue="chat")
def ask(ctx, request):
    question, sent = request.text(), 0
    try:
        reply = requests.get(f"{TOKEN_API}/tokens", params={"q": question}, stream=True, timeout=(5, 120))
        with ctx.closing(reply) as response:
            if response.status_code != 200:
                raise RuntimeError(f"the token service answered {response.status_code}")  # the page shows this text
            for token in response.iter_lines(chunk_size=1):
                yield token
                sent += 1
    finally:
        print(f"{question}: the handler ended after {sent} tokens", flush=True)
