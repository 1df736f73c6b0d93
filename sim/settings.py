"""What commands are set to, by option or variable: a wrong value gets one sentence and exit status 2."""

__all__ = ["BadSetting", "number"]


class BadSetting(ValueError):
    """A value of the command line or of a variable that does not do; its text is one sentence for the user."""


def number(name, text, low, high):
    """Return ``text`` as a whole number from ``low`` to ``high``, decimal or 0x; :exc:`BadSetting` when it is none."""
    try:
        value = int(text, 0)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise BadSetting(f"{name} must be a whole number from {low:,} to {high:,}, not {text!r}.")
    return value
