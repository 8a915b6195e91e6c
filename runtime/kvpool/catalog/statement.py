"""The text of a statement that is sent to the catalog, with named parameters."""


class Statement(bytes):
    """Constants of this type, anywhere in the package, are planned by a test over a large catalog: none reads it whole.

    Text from outside is never part of one; it comes as a parameter.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "Statement":
        """Take text that was written in this program."""
        return super().__new__(cls, text.encode())
