"""A Django project for the tests: in this process, under runserver and gunicorn, and with the worker command."""

import os

SECRET_KEY = "only for tests"
DEBUG = False
ALLOWED_HOSTS = ["*"]
USE_TZ = True
TIME_ZONE = "UTC"
ROOT_URLCONF = "django_site.urls"
WSGI_APPLICATION = "django_site.wsgi.application"
MIDDLEWARE = [
    "natsync.contrib.django.middleware.NatsErrorMiddleware",
    "django.middleware.common.CommonMiddleware",
    *filter(None, os.environ.get("SITE_MIDDLEWARE", "").split(",")),
]
INSTALLED_APPS = ["django.contrib.staticfiles", "natsync.contrib.django", "django_site"]
STATIC_URL = "/static/"
DATABASES = {
    "default": {
        "ENGINE": os.environ.get("SITE_DB_ENGINE", "django_site.killable"),
        "NAME": os.environ.get("SITE_DB", ":memory:"),
        "CONN_MAX_AGE": None,  # connections are kept, so that one that dies is noticed
        "OPTIONS": {},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
# Without a URL: NATS_URL, which the tests set for the processes they start.
NATSYNC = {
    "NAME": "django-site",
    "CONNECT_TIMEOUT": 5,
    "RECONNECT_WAIT": 0.1,
    "RESUME_GRACE": float(os.environ.get("SITE_RESUME_GRACE", "10")),
    "HEARTBEAT": float(os.environ.get("SITE_HEARTBEAT", "5")),
}
