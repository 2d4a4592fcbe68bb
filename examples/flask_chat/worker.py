"""The chat's responder: asks the third party, and passes each token on as it comes.

    natsync serve worker

TOKEN_API_URL says where the third party is.
"""

import os

import requests

import natsync

URL = os.environ.get("TOKEN_API_URL", "http://127.0.0.1:8001") + "/tokens"

subscriber = natsync.Subscriber()


@subscriber.stream("chat.tokens", queue="chat")
def tokens(ctx, request):
    # When the reader leaves, ctx is cancelled, and that closes the connection to the third party, though it be silent.
    with ctx.closing(requests.post(URL, json=request.json(), stream=True, timeout=(5, 60))) as response:
        if response.status_code != 200:
            raise RuntimeError(f"the token service answers {response.status_code}")
        for line in response.iter_lines():
            yield line.decode() + " "
