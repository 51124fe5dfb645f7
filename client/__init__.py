"""The command line: many images through the service, or through the same classes in this process."""
