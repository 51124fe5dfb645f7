"""The classifier itself: configuration, network, preprocessing, runtimes, batching and model store.

Nothing here knows about HTTP, BentoML services or training.
"""
