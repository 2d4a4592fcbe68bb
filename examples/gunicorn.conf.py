"""gunicorn for applications that stream over natsync: gunicorn --config gunicorn.conf.py app:app

A natsync client starts no thread and opens no socket before its first use, so the application may be loaded before the
workers fork (preload_app): that shares memory, and a mistake in it shows at once.
"""

bind = "127.0.0.1:8080"
workers = 2
preload_app = True

# Each open stream occupies a thread: workers * threads is how many browsers can listen at once. gthread goes on while a
# thread waits for the next chunk, whatever `timeout` says, which the sync worker does not.
worker_class = "gthread"
threads = 64

# Seconds that streams get to end after SIGTERM. Those that do not are cut off without a word; the responder finds that
# out by itself and cancels the handler.
graceful_timeout = 30
