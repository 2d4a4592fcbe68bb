"""What the worker serves. Database connections are looked after before and after each handler."""

import requests
from django.conf import settings

from natsync.contrib.django import subscriber
from notes.models import Note


@subscriber.handler("notes.add")
def add(ctx, request):
    return {"id": Note.objects.create(text=request.text()).pk}


@subscriber.stream("notes.search")
def search(ctx, request):
    """The notes with this text in them, one by one, as slowly as somebody who thinks."""
    for note in Note.objects.filter(text__icontains=request.text()).order_by("pk").iterator():
        yield note.text
        if ctx.wait(0.2):  # the browser has left
            return


@subscriber.stream("notes.ask")
def ask(ctx, request):
    """The tokens of a third party. ctx.closing() wakes a read that is blocked there when the browser has left."""
    question, sent = request.text(), 0
    try:
        reply = requests.get(f"{settings.TOKEN_API}/tokens", params={"q": question}, stream=True, timeout=(5, 120))
        with ctx.closing(reply) as response:
            if response.status_code != 200:
                raise RuntimeError(f"the token service answered {response.status_code}")  # the page shows this text
            for token in response.iter_lines(chunk_size=1):
                yield token
                sent += 1
    finally:
        print(f"{question}: the handler ended after {sent} tokens", flush=True)
