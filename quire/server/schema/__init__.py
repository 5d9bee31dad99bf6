"""The dialect: models of request bodies, and the layout of answers. Knows JSON shapes; knows no sockets and no engine."""
