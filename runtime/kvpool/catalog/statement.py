"""The text of a statement that is sent to the catalog, with named parameters."""


class Statement(bytes):
    """Constants of this type, anywhere in the package, are planned by a test over a large catalog: none reads it whole.

    Text from outside is never part of one; it comes as a parameter.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "Statement":
        """Take text that was written in this program."""
        return super().__new__(cls, text.encode())


LOOK_UP = Statement("""
    select set_config('plan_cache_mode', 'force_custom_plan', true), set_config('jit', 'off', true),
           set_config('enable_seqscan', 'off', true), set_config('enable_hashjoin', 'off', true),
           set_config('enable_mergejoin', 'off', true)
""")
"""Begins a transaction of statements that look single rows up. The planner is not to choose anything else for them: not
by statistics of a table that was empty yesterday, nor as it thinks of one table's rows against another's."""
