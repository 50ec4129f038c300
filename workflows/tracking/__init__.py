"""MLflow runs, and a buffer for when the server does not answer."""
