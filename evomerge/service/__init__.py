"""One address where runs are submitted, watched and taken away as models.

A web application over the store (`app`), and a supervisor that gives every run a driver process of its own
(`supervisor`). The service is no Ray driver, loads no torch and holds nothing in memory that it could lose:
the queue is in the store.
"""
