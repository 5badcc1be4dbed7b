"""The two things Octavo says when something is wrong: an error that stops, a warning that does not.

Every message names the layer, tensor or file it is about and says what to do next.
"""


class OctavoError(ValueError):
    """Bad input or a request that cannot be met; the message names the thing and the remedy."""


class OctavoWarning(UserWarning):
    """Something a user should know that does not stop the work."""
