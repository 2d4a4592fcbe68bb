"""What the worker serves. Database connections are looked after before and after each handler."""

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
