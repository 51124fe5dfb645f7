"""From labelled images to an artifact that serves: ``check fit export evaluate robustness foreign report``, in that
order; ``gate`` compares two artifacts, and ``readme`` writes what README.md says of the shipped one.

One verb and one command each; every module that is one opens with the command that runs it.
"""
