"""The HTTP door: OpenAI's dialect over the application (quire/service).

Knows sockets, headers, JSON shapes and signals; of the engine it knows nothing but what the application tells.
"""
