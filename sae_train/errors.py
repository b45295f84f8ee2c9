"""What can end a run, and the exit code that says which.

0 done; 2 the user's input is wrong; 3 the numbers went bad; 75 stopped early, saved, run the
same command again (EX_TEMPFAIL; also `stop.Interrupted`); 130 / 143 a second signal.
"""


class InputError(ValueError):
    """Something the user gave cannot work: one line naming field, value and what would be accepted.

    Args:
        field: the configuration key or file as the user would write it, for example ``sae.activation.k``.
        value: what was given.
        accepted: what would be accepted, as a phrase completing "expected ...".
    """

    exit_code = 2

    def __init__(self, field: str, value: object, accepted: str) -> None:
        super().__init__(f"{field}={value!r}: expected {accepted}")
        self.field, self.value, self.accepted = field, value, accepted


class NumericsError(RuntimeError):
    """Too many non-finite rows or steps: continuing would poison the weights."""

    exit_code = 3


class StoppedEarly(RuntimeError):
    """The run stopped early for an outside reason; what was done is saved, the same command continues it."""

    exit_code = 75


class LostProcess(StoppedEarly):
    """Another process of the run is gone or does not answer: nothing can be done together any more."""
