"""Groups of processes that the files of this folder share."""

import pytest


@pytest.fixture(scope="session")
def ranks():
    """`ranks(world).run(function, *args)`; started when first asked for."""
    from ranks import Ranks

    made = {}

    def of(world):
        if world not in made:
            made[world] = Ranks(world)
        return made[world]

    yield of
    for group in made.values():
        group.close()
