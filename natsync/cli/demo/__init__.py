"""`natsync demo`: the main job, shown on a real server, a real HTTP service and real threads.

third_party.py   the slow HTTP service, a Flask application on a loopback port
handlers.py      what the subscriber serves: a relay of that service, and a ticker
wire.py          a client that is nothing but a socket
screen.py        how it looks
scenes.py        what is shown, in order, each step checked
run.py           starts all of it, plays the scenes, stops all of it
"""
