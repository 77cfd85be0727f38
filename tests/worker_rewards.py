"""A reward for a process of its own, apart from the tests so that this process imports little."""

import os

from stage_grpo.rewards.worker import SIGNALS


class TwoFoldError(Exception):
    """Cannot be made anew from what it is pickled as."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def grey_or_die(images, prompts, metadata, *, scale=1.0):
    """Grey level / 10, and 1 more in the process that the first prompt names; other prompts say what else happens."""
    if "die" in prompts:
        os._exit(1)
    if "exit" in prompts:
        raise SystemExit(3)
    if "odd" in prompts:
        raise TwoFoldError("this", "that")
    for number in SIGNALS if "signals" in prompts else ():
        os.kill(os.getpid(), number)
    return [scale * image.getpixel((0, 0))[0] / 10 + (os.getpid() == int(prompts[0])) for image in images]
