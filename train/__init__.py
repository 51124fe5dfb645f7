"""From labelled images to an artifact ready to serve: ``check fit export evaluate robustness foreign report``, in that
order; ``gate`` compares two artifacts, and ``readme`` writes README.md's section on the shipped one.

Each of these modules is a command, and its docstring shows how to run it.
"""
