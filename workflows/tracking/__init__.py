"""MLflow runs, and an outbox for entries that the server does not accept yet."""
