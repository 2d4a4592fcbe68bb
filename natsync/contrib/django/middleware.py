"""natsync's errors as JSON responses, for views that leave them uncaught."""

from __future__ import annotations

import logging
from typing import Any

from django.http import HttpRequest, JsonResponse
from django.utils.deprecation import MiddlewareMixin

import natsync
from natsync.contrib.failures import error_data, http_headers, http_status

log = logging.getLogger("natsync.contrib")


class NatsErrorMiddleware(MiddlewareMixin):
    """Add it to MIDDLEWARE, and a natsync error that a view raises becomes JSON with the status that says the same.

    A timeout is 504; no responders, no link to NATS and a refusal (with Retry-After) are 503; a handler's error goes by
    its code. See natsync.contrib.failures. The log has the error itself.
    """

    def process_exception(self, request: HttpRequest, exception: Exception) -> Any:
        if not isinstance(exception, natsync.NatsError) or isinstance(exception, natsync.InvalidArgument):
            return None
        log.warning("%s %s: %s: %s", request.method, request.path, type(exception).__name__, exception)
        return JsonResponse(error_data(exception), status=http_status(exception), headers=http_headers(exception))
