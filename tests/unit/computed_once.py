"""Values and drawings that many made-up runs have in common, computed once a process instead of once a run.

Only pure functions of other libraries are remembered, so that what is tested still asks for every value it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest


def remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with a memory of its results; arrays among its arguments count by their content."""
    results: dict[Any, Any] = {}

    def key_of(value: Any) -> Any:
        return (value.shape, value.dtype.str, value.tobytes()) if hasattr(value, "tobytes") else value

    def call(*arguments: Any, **named: Any) -> Any:
        key = (*map(key_of, arguments), *((name, key_of(value)) for name, value in sorted(named.items())))
        if key not in results:
            results[key] = function(*arguments, **named)
        return results[key]

    return call


@pytest.fixture(scope="session", autouse=True)
def statistics_computed_once() -> Iterator[None]:
    """Remember exact tests, binomial quantiles and word stems: thousands of made-up answers ask for the same few."""
    import scipy.stats
    from nltk.stem.porter import PorterStemmer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scipy.stats, "binomtest", remembering(scipy.stats.binomtest))
        patch.setattr(scipy.stats.binom, "ppf", remembering(scipy.stats.binom.ppf))
        stem = remembering(PorterStemmer().stem)
        patch.setattr(PorterStemmer, "stem", lambda stemmer, word, *given: stem(word, *given))
        yield


@pytest.fixture
def undrawn_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not rendered: for tests of a page's text, where rendering takes most of the time."""
    import matplotlib.figure

    def save(figure: Any, target: Any, **options: Any) -> None:
        target.write(b"\x89PNG not rendered")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
