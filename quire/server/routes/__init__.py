"""The routes, one thin file a group: read the body, ask the application, write the answer. No rules of their own."""
