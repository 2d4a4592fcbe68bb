"""For development; see Django's deployment checklist before this meets the world."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = os.environ.get("SECRET_KEY", "for development only")
DEBUG = True
ALLOWED_HOSTS = os.environ.get("ALLOWED_HOSTS", "127.0.0.1 localhost").split()
ROOT_URLCONF = "mysite.urls"
WSGI_APPLICATION = "mysite.wsgi.application"
USE_TZ = True
TIME_ZONE = "UTC"

INSTALLED_APPS = ["natsync.contrib.django", "notes"]
MIDDLEWARE = [
    "django.middleware.common.CommonMiddleware",
    "natsync.contrib.django.middleware.NatsErrorMiddleware",
]
TEMPLATES = [{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", BASE_DIR / "db.sqlite3"),
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

# Options of natsync.Client in capitals. Without "URL" it is NATS_URL, or a server on this machine.
NATSYNC = {"NAME": "notes"}

TOKEN_API = os.environ.get("TOKEN_API", "http://127.0.0.1:9000")  # the third party that notes.ask reads from
SSE_HEARTBEAT = float(os.environ.get("SSE_HEARTBEAT", 15))  # seconds of silence until a stream sends a comment
