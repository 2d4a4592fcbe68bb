"""The Django app: system checks, and a client that follows the settings."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed

from natsync.contrib.django import checks as own_checks
from natsync.contrib.django.clients import close_client
from natsync.contrib.django.conf import SETTING


class NatsyncConfig(AppConfig):
    """`INSTALLED_APPS = ["natsync.contrib.django"]`."""

    name = "natsync.contrib.django"
    label = "natsync"
    verbose_name = "natsync"

    def ready(self) -> None:
        checks.register(own_checks.check_setting, own_checks.TAG)
        checks.register(own_checks.check_server_interface, own_checks.TAG)
        checks.register(own_checks.check_url_given, own_checks.TAG, deploy=True)
        setting_changed.connect(_setting_changed, dispatch_uid="natsync")


def _setting_changed(*, setting: str, **_: Any) -> None:
    """A test has overridden the setting, or given it back: the next use makes a client with the new one."""
    if setting == SETTING:
        close_client()
