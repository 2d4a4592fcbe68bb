"""gunicorn for applications that stream: `gunicorn --config gunicorn.conf.py app:app`.

An open stream holds a thread of its worker for as long as it lasts: threads × workers is how many browsers can read at
once, and one more waits. A thread that waits costs some 100 KiB. For thousands, see gunicorn_gevent.conf.py.
"""

bind = "127.0.0.1:8000"
worker_class = "gthread"
workers = 2
threads = 64

# The application is imported once, before the workers are forked. That is safe with a natsync client that is made at
# import: it opens nothing until it is used, and each worker makes a connection of its own.
preload_app = True

# With gthread this is for a worker that hangs altogether. It does not end streams, however long they last; with the
# sync worker it would.
timeout = 30

# On SIGTERM streams get so long to finish. What is left is cut off without a word; the responder finds that out by
# itself, within natsync's resume_grace and heartbeat.
graceful_timeout = 10
