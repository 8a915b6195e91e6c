"""The demo: chats with a real model on a small pool, which is closed, opened again, and answers from SSD.

`python -m kvpool.demo` plays it; every block that comes back is compared with what was stored, and every answer with
one that continues from the same keys and values kept in memory.
"""
