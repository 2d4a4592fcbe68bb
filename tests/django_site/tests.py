"""Tests as a project writes them; test_django.py runs them by `manage.py test`."""

import urllib.request

from django.test import LiveServerTestCase

from django_site.models import Note
from natsync.contrib.django.test import NatsServerMixin, NatsTestCase


class HandlersTest(NatsTestCase):
    def test_a_handler_sees_the_rows_of_the_test_and_the_test_sees_the_handlers(self):
        Note.objects.create(text="by the test")
        self.serve_handlers()
        assert self.nats.request("site.note", "by a handler", timeout=20).json()["notes"] == 2
        assert [note.text for note in Note.objects.order_by("pk")] == ["by the test", "by a handler"]

    def test_a_test_begins_without_the_rows_of_another(self):
        self.serve_handlers()
        assert list(self.nats.stream("site.notes", timeout=20)) == []

    def test_views_use_the_server_of_the_test(self):
        self.serve_handlers()
        assert self.client.get("/request/site.version").json() == {"reply": "1"}

    def test_handlers_are_served_in_the_tests_that_say_so(self):
        assert self.client.get("/request/site.version").status_code == 503


class PageTest(NatsServerMixin, LiveServerTestCase):
    def test_a_page_has_events_of_a_stream(self):
        self.serve_handlers()
        with urllib.request.urlopen(f"{self.live_server_url}/stream/site.slow?payload=0", timeout=20) as page:
            assert page.read() == b": stream\n\ndata: begun\n\ndata: finished\n\nevent: end\ndata: \n\n"
