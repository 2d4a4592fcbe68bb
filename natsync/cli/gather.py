"""One question, the answers of many: for commands that ask whoever is there."""

import time

import natsync

#: Seconds without a further answer after which there are taken to be no more. Default of nats.go's RequestMany.
STALL = 0.3


def ask_all(
    client: natsync.Client,
    subject: str,
    payload: bytes = b"",
    *,
    timeout: float,
    stall: float = STALL,
) -> list[tuple[natsync.Message, float]]:
    """Publish a question, and return what comes within timeout seconds, each answer with its seconds from the question.

    Blocks until timeout, or until none came for stall seconds after the first. Returns at once, with what has come,
    if the link breaks, or nothing subscribes to the subject.
    """
    answers: list[tuple[natsync.Message, float]] = []
    began = time.monotonic()
    try:
        for message in client.request_many(subject, payload, timeout=timeout, stall=stall):
            answers.append((message, time.monotonic() - began))
    except (natsync.NoRespondersError, natsync.ConnectionLost, natsync.RequestTimeout):
        pass
    return answers
