from natsync.contrib.django.test import NatsTestCase


class NotesTest(NatsTestCase):
    def test_notes_are_found_again(self):
        self.serve_handlers()
        for text in ("bread", "butter", "brown bread"):
            assert self.client.post("/add", {"text": text}).status_code == 200
        events = b"".join(self.client.get("/search?text=bread").streaming_content)
        assert events == b": stream\n\ndata: bread\n\ndata: brown bread\n\nevent: end\ndata: \n\n"

    def test_without_a_worker_the_page_is_told(self):
        response = self.client.post("/add", {"text": "bread"})
        assert (response.status_code, response.json()["message"]) == (503, "the service is not running")
