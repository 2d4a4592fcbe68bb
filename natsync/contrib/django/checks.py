"""System checks: `manage.py check` finds a setting that would only fail at the first request.

natsync.E001 NATSYNC is no dict · E002 unknown key · E003 unusable URL · E004 unusable option · E005 unusable limit ·
E006 unusable queue group · W001 streams under ASGI · W002 (--deploy) no URL given.
"""

from __future__ import annotations

import os
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning

from natsync.contrib.django.conf import SETTING, problems

TAG = "natsync"


def check_setting(app_configs: Any, **_: Any) -> list[CheckMessage]:
    """E001 to E006."""
    return [
        Error(one.text, hint=one.hint, id=f"natsync.E00{one.number}")
        for one in problems(getattr(settings, SETTING, {}))
    ]


def check_server_interface(app_configs: Any, **_: Any) -> list[CheckMessage]:
    """W001."""
    if not getattr(settings, "ASGI_APPLICATION", None):
        return []
    return [
        Warning(
            "ASGI_APPLICATION is set: under ASGI each open sse_response() holds one of the few threads of the event "
            "loop's executor, and further streams wait for one",
            hint="Serve the views with streams over WSGI, with as many threads as streams (gunicorn -k gthread); or "
            'silence this by SILENCED_SYSTEM_CHECKS = ["natsync.W001"].',
            id="natsync.W001",
        )
    ]


def check_url_given(app_configs: Any, **_: Any) -> list[CheckMessage]:
    """W002."""
    value = getattr(settings, SETTING, {})
    if os.environ.get("NATS_URL") or not isinstance(value, dict) or value.get("URL") is not None:
        return []
    return [
        Warning(
            f"neither {SETTING}['URL'] nor the environment variable NATS_URL names a NATS server: localhost is used",
            id="natsync.W002",
        )
    ]
