from django.http import HttpResponse, JsonResponse
from django.views.decorators.http import require_POST

from natsync.contrib.django import client, sse_response

PAGE = """<!doctype html>
<title>Notes</title>
<form id="new"><input name="text" placeholder="a note"> <button>Add</button></form>
<form id="search"><input name="text" placeholder="search"> <button>Search</button>
<button type="button" id="stop">Stop</button></form>
<ol id="found"></ol>
<p id="state"></p>
<script>
const found = document.getElementById("found"), state = document.getElementById("state");
let events;
const stop = (text) => { if (events) events.close(); state.textContent = text; };
document.getElementById("new").onsubmit = async (event) => {
  event.preventDefault();
  const answer = await fetch("/add", {method: "POST", body: new URLSearchParams(new FormData(event.target))});
  const said = await answer.json();
  state.textContent = answer.ok ? `note ${said.id}` : said.message;
  event.target.reset();
};
document.getElementById("search").onsubmit = (event) => {
  event.preventDefault();
  stop("searching");
  found.replaceChildren();
  events = new EventSource("/search?" + new URLSearchParams(new FormData(event.target)));
  events.onmessage = (one) => found.appendChild(document.createElement("li")).textContent = one.data;
  events.addEventListener("end", () => stop("that is all"));
  // natsync's own error events have data; without any, the link is broken
  events.addEventListener("error", (one) => stop(one.data ? JSON.parse(one.data).message : "the connection broke"));
};
document.getElementById("stop").onclick = () => stop("stopped");
</script>
"""


def page(request):
    return HttpResponse(PAGE)


@require_POST
def add(request):
    return JsonResponse(client.request("notes.add", request.POST["text"], timeout=5).json())


def search(request):
    return sse_response(client.stream("notes.search", request.GET.get("text", ""), idle_timeout=30))
