from django.conf import settings
from django.http import JsonResponse
from django.shortcuts import render
from django.views.decorators.http import require_POST

from natsync.contrib.django import client, sse_response


def page(request):
    return render(request, "notes/page.html")


@require_POST
def add(request):
    return JsonResponse(client.request("notes.add", request.POST["text"], timeout=5).json())


def search(request):
    stream = client.stream("notes.search", request.GET.get("text", ""), idle_timeout=30)
    return sse_response(stream, heartbeat=settings.SSE_HEARTBEAT)


def ask(request):
    stream = client.stream("notes.ask", request.GET.get("text", ""), idle_timeout=120)
    return sse_response(stream, heartbeat=settings.SSE_HEARTBEAT)
