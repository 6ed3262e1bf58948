class ThriftyError(ValueError):
    """Something a user can put right: a file, an option, a shape.

    The message is one sentence, `[op] rule; got X; way out`. The command line prints it and exits with code 2.
    """


class ThriftyWarning(UserWarning):
    """Something was done in another way than was asked for; the message says which, and what it costs."""
