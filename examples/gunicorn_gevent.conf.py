"""gunicorn with greenlets instead of threads: `gunicorn --config gunicorn_gevent.conf.py app:app`. Needs gevent.

The worker replaces threading, socket and the like before it imports the application, natsync included; nothing has to
be configured there. Each open stream holds a greenlet.
"""

bind = "127.0.0.1:8080"
worker_class = "gevent"
workers = 2
worker_connections = 1000  # streams at once in each worker

# Streams and their heartbeats are switched between where they wait, so a view that computes for long holds up all.
timeout = 30
graceful_timeout = 10
