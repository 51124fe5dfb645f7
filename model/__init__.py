"""What a classifier is: its configuration, network, preprocessing, runtimes, batching and store.

Nothing here knows of HTTP, of BentoML services or of training.
"""
