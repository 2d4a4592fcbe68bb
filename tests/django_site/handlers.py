"""Handlers of the worker's tests."""

import os
import threading

from django.db import connection

from django_site.models import Note
from natsync.contrib.django import subscriber


@subscriber.handler("site.version")
def version(ctx, request):
    return os.environ.get("SITE_VERSION", "1")


@subscriber.handler("site.process")
def process(ctx, request):
    return {"pid": os.getpid(), "thread": threading.current_thread().name}


@subscriber.handler("site.note")
def note(ctx, request):
    """Writes a row; how many there are, which database connection it was, and on which thread."""
    Note.objects.create(text=request.text())
    return {"notes": Note.objects.count(), "connection": id(connection.connection), "thread": threading.get_ident()}


@subscriber.handler("site.kill-connection")
def kill_connection(ctx, request):
    """What a restarted database does to a connection: nothing is told, and the next use fails."""
    connection.ensure_connection()
    connection.connection.close()


@subscriber.stream("site.notes")
def notes(ctx, request):
    for one in Note.objects.order_by("pk").iterator():
        yield one.text


@subscriber.stream("site.slow")
def slow(ctx, request):
    """One chunk, then nothing until it is cancelled or the given seconds have passed; then another one."""
    yield "begun"
    yield "cancelled" if ctx.wait(float(request.text())) else "finished"


@subscriber.stream("site.stubborn")
def stubborn(ctx, request):
    """Does not look at its ctx."""
    yield "begun"
    threading.Event().wait(float(request.text()))


@subscriber.subscribe("site.noted")
def noted(message):
    Note.objects.create(text=message.text())
