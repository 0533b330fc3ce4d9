"""The mechanism in a few lines: the last checkpoint's row of the table, a measure a line.  Pure."""

from .finding import Finding


def last_checkpoint(mechanism: Finding) -> list[str]:
    """What was measured at the last finished checkpoint, and how to see the others."""
    assert mechanism.table is not None
    label, row = str(mechanism.table.index[-1]), mechanism.table.iloc[-1]
    width = max(len(str(name)) for name in row.index)
    measured = [f"  {name!s:<{width}}  {value}" for name, value in row.items()]
    n = len(mechanism.table)
    others = f"how to read them, and all {n} checkpoints: --verbose" if n > 1 else "how to read them: --verbose"
    return [f"mechanism at {label}", *measured, f"  {others}"]
