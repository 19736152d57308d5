"""What ends a run, or its measurement, before its time."""


class AskedToStop(Exception):  # noqa: N818 - nothing went wrong
    """Raised on every worker alike, while answers are measured: training is done and saved, and measured next time."""


class TakenOver(RuntimeError):  # noqa: N818 - a state of affairs
    """The run folder is another driver's now."""


class StoppedRun(RuntimeError):
    """Raised on every worker alike: this run cannot go on, and starting it again would end the same way."""


class NoRoom(TimeoutError):
    """What was asked for did not become free in time; says how much that is, how much is free and what to do."""


class RunFailed(RuntimeError):
    """The run ended by an error that is not the user's input; its cause is the error."""
