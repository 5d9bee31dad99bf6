"""The application without HTTP: admission, life cycle, and the way from a request to plain results.

Knows the engine's interface; knows no status codes, headers, JSON shapes or sockets (quire/server does).
"""
