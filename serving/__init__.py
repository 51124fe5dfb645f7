"""Everything between the service and the wire: request formats, errors, metrics, logs and the outermost middleware."""
