"""From labelled images to an artifact that serves: ``data``, ``fit``, ``export``, ``evaluate``.

One verb and one command each; every module opens with the command that runs it.
"""
