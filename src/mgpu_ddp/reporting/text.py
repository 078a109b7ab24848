"""Numbers as people read them, and what is said in more than one place."""

RANDOM_WEIGHTS = "random weights: rows say nothing about the images (model.weights=DEFAULT takes trained ones)"


def hours_minutes_seconds(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else hours_minutes_seconds(seconds)


def gibibytes(number: float, digits: int = 1) -> str:
    return f"{number / 2**30:.{digits}f} GiB"
