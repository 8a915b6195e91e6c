"""Qdrant's engine in a process of its own, for one machine without a server.

The engine's Python package holds the interpreter's lock in all that it does, up to 40 s while it builds the graph of
100,000 prompts (measured with 0.9.0): in the process that serves, every other thread would stand still so long.

    parent (embedded.py)        searches and updates, a socket each
    serving (this package)      owns the directory, answers; the graph that it searches is never changed
    building (this package)     copies the points, builds the graph anew in the copy, and ends

Each ends when the one above it does.
"""
