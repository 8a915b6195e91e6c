"""What the adaptive policy tells apart: how often a block was asked for, and whether it was the last of a prompt."""

MOST_USES = 16
LAST = MOST_USES + 1
"""The trait of a prompt's last block that was asked for once: prompts part there, so that it is worth less. Other
traits are the number of uses."""
STEP = bytes([*range(1, MOST_USES + 1), MOST_USES, 2]).ljust(256, bytes([MOST_USES]))
"""For `bytes.translate`: the traits of blocks after one more use."""
CLASS_OF = bytes([0, 0, 1, 2, *[3] * 2, *[4] * 2, *[5] * 4, *[6] * 4, 7, 8]).ljust(256, b"\0")
"""By trait: its class, of which each has one head start: 1, 2, 3, 4, 6, 8, 12, 16 uses; last."""
CLASSES = 9
