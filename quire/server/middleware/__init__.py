"""Pure ASGI layers around the routes, outermost first: edge, keys, intake. They see bytes and headers, never a model."""
