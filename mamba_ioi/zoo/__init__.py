"""Models that ship with the package: `tiny`, trained on the task, and `planted`, with a known circuit."""
