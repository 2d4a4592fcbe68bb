"""Integrations with other packages: each module needs its own extra, and nothing in natsync imports them."""
