"""The dragonfly tier: sealed records in servers of the Redis protocol (Dragonfly, Valkey, Redis >= 6.2, a cluster).

tier         the tier itself: what is asked in which order, and what the answers mean
names        what a key looks like
commands     requests and answers as data
servers      which server is asked for which key; one call's round trips
connections  a bounded number of connections to one server
opening      connecting and logging in, by redis-py
exchange     one pipeline on one connection
wire         a connection: bytes in, bytes out, both at once
patience     how long a call has moved nothing
sweeping     removing what has a name of a kind, step by step
"""
