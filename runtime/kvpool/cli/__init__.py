"""The `kvpool` command: what is typed, what is printed, and the exit code. All else is the library's."""
