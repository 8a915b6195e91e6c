"""The dragonfly tier: sealed records in servers of the Redis protocol (Dragonfly, Valkey, Redis >= 6.2, a cluster).

tier            the tier itself: what is asked in which order, and what the answers mean
names           what a key looks like
sweeping        removing what has a name of a kind, step by step
epochs          the hint at tenants' epochs
server_info     what a server says of itself
servers         which server is asked for which key; one call's round trips
topology        which node of a cluster has which key
conversation    one call's requests to one server
connections     a bounded number of connections to one server
opening         connecting and logging in, by redis-py
exchange        one pipeline on one connection
wire            a connection: bytes in, bytes out, both at once
streams         the socket under it, in the clear or in TLS
commands        requests and answers as data
patience        for how long a call has moved nothing
faults          what can go wrong
"""
