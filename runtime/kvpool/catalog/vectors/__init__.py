"""Embeddings of past prompts in Qdrant: in a process of its own beside this one, or on a server.

Hints, and nothing else: losing them costs a prefetch, and what they lead to is an exact prefix or nothing.
"""
