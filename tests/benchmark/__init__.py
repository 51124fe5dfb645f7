"""The bundle and what it is compared with, measured one after another: ``make bench``. pytest runs none of it."""
