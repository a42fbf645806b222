"""The database of --database: what must outlive the server, in one file of SQLite, and its tables."""
