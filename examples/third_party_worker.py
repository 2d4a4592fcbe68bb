"""A worker that forwards a slow HTTP API line by line, and stops reading the moment nobody wants it any more.

    cd examples
    THIRD_PARTY_URL=http://127.0.0.1:8000 natsync serve third_party_worker
    natsync stream third.party /some/path

Needs requests. `ctx.closing()` shuts the response's socket down when the client cancels, goes away or runs
into its deadline: a read that is blocked in the HTTP service returns at once, which closing the response
would not achieve.
"""

import os

import requests

import natsync

THIRD_PARTY_URL = os.environ.get("THIRD_PARTY_URL", "http://127.0.0.1:8000")

subscriber = natsync.Subscriber()


@subscriber.stream("third.party", queue="workers")
def forward(ctx, request):
    url = THIRD_PARTY_URL + request.text()
    # timeout: seconds to connect, and seconds between two reads.
    with ctx.closing(requests.get(url, stream=True, timeout=(5, 60))) as response:
        response.raise_for_status()
        # chunk_size=1 gives each line when it is there, whatever way the service frames its answer.
        yield from response.iter_lines(chunk_size=1)


if __name__ == "__main__":
    subscriber.serve_forever()
