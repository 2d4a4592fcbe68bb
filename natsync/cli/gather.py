"""One question, the answers of many: for commands that ask whoever is there."""

import time

import natsync
from natsync.cli.connection import inbox_prefix
from natsync.headers import HeaderInput
from natsync.subject import unique

#: Seconds without a further answer after which there are taken to be no more. Default of nats.go's RequestMany.
STALL = 0.3
#: Status of the message by which a server says that nothing subscribes to the subject.
_NO_RESPONDERS = 503


def ask_all(
    client: natsync.Client,
    subject: str,
    payload: bytes = b"",
    *,
    timeout: float,
    stall: float | None = STALL,
    most: int | None = None,
    headers: HeaderInput = None,
) -> list[tuple[natsync.Message, float]]:
    """Publish a question, and return what comes within timeout seconds, each answer with its seconds from the question.

    Blocks until timeout, until `most` answers have come, or until none came for stall seconds after the first
    (None = wait for timeout). Returns at once, without any, if nothing subscribes to the subject.
    """
    answers: list[tuple[natsync.Message, float]] = []
    inbox = f"{inbox_prefix()}.{unique()}"
    with client.subscribe(inbox) as subscription:
        began = time.monotonic()
        client.publish(subject, payload, reply=inbox, headers=headers)
        while most is None or len(answers) < most:
            left = began + timeout - time.monotonic()
            if answers and stall is not None:
                left = min(left, stall)
            try:
                message = subscription.next(max(0.0, left))
            except natsync.TimedOut:
                break
            if message.status == _NO_RESPONDERS:
                break
            answers.append((message, time.monotonic() - began))
    return answers
