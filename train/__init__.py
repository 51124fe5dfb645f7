"""From labelled images to an artifact that serves: ``check fit export evaluate robustness report``, in that order.

One verb and one command each; every module that is one opens with the command that runs it.
"""
