"""Measures the bundle and other servers one after another: ``make bench``. Not part of the pytest suite."""
