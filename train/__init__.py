"""From labelled images to an artifact ready to serve: ``check fit export evaluate robustness foreign report``, in that
order. For a network trained elsewhere, ``convert`` replaces ``fit`` and ``export``. ``review`` sorts images that a
service has kept, ``gate`` compares two artifacts, ``readme`` writes what README.md says of the shipped ones.
Each of these modules is a command, and its docstring shows how to run it.
"""
