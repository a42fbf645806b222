"""What serves the routes that chat_server.py lists: connections, access, bodies, streams, recordings,
metrics, the page's files, and what the server says of itself. The handler of a new route belongs here."""
