"""What stands between the service and the wire: request forms, errors, metrics, logs and the outermost middleware."""
