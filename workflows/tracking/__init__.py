"""MLflow runs, and the outbox that keeps what a server does not answer."""
