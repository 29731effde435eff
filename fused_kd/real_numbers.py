"""Real numbers of any library's, as arguments."""

import numbers


def number(name: str, value: object, what: str = "a number") -> float:
    """A real number (np.float32(2)) as Python's; one that torch.compile keeps symbolic as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be {what}, got {described(value)}")
    return value if isinstance(value, (int, float)) else float(value)


def described(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
