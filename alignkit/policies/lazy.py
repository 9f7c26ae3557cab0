"""Bundles that are made when they are asked for, because all of them would not fit in memory."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import overload

from alignkit.batches import Bundle


class Selected(Sequence[Bundle]):
    """Some places of other bundles, perhaps each of them changed; made when they are asked for."""

    def __init__(
        self,
        bundles: Sequence[Bundle],
        places: Sequence[int],
        change: Callable[[int, Bundle], Bundle] = lambda place, bundle: bundle,
    ) -> None:
        self.bundles = bundles
        self.places = places
        self.change = change

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Bundle: ...
    @overload
    def __getitem__(self, place: slice) -> "Selected": ...
    def __getitem__(self, place: int | slice) -> "Bundle | Selected":
        if isinstance(place, slice):
            return Selected(self.bundles, self.places[place], self.change)
        return self.change(self.places[place], self.bundles[self.places[place]])


class Joined(Sequence[Bundle]):
    """Several sequences of bundles, one behind the other."""

    def __init__(self, parts: Sequence[Sequence[Bundle]]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, place: int) -> Bundle: ...
    @overload
    def __getitem__(self, place: slice) -> Selected: ...
    def __getitem__(self, place: int | slice) -> "Bundle | Selected":
        if isinstance(place, slice):
            return Selected(self, range(*place.indices(len(self))))
        place = range(len(self))[place]
        part = bisect_right(self.starts, place) - 1
        return self.parts[part][place - self.starts[part]]


def changed(bundles: Sequence[Bundle], change: Callable[[int, Bundle], Bundle]) -> Sequence[Bundle]:
    """`change(place, bundle)` of each bundle: a list of a list, else made when it is asked for."""
    if isinstance(bundles, list):
        return [change(place, bundle) for place, bundle in enumerate(bundles)]
    return Selected(bundles, range(len(bundles)), change)
