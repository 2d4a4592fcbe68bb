"""Streams over request and reply: the pieces of an answer, as they come."""
