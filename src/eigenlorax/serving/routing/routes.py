"""Results of a router: the route of a text, and figures over many texts."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Route:
    """Route of one text.

    Attributes:
        adapter: Name of the adapter; None for the base model.
        confidence: Confidence in the most probable adapter, on the scale of the threshold.
        scores: Probabilities of the most probable adapters, largest first, whether or not the text is routed.
        reason: One line that says why.
    """

    adapter: str | None
    confidence: float
    scores: dict[str, float]
    reason: str


@dataclass(frozen=True, slots=True)
class RoutingFigures:
    """Figures of a router on rows whose adapters are known. All shares are from 0 to 1.

    Attributes:
        rows: Number of rows of adapters.
        signals: Share of the rows whose best adapter by one signal alone is the right one, by signal.
        accuracy: The same for the combination that the router uses, before abstention.
        routed_right: Share of the rows that are routed to the right adapter.
        abstentions: Share of the rows that go to the base model.
        base_rows: Number of rows that belong to no adapter.
        false_accepts: Share of these that are routed to an adapter; None if there are none.
    """

    rows: int
    signals: dict[str, float]
    accuracy: float
    routed_right: float
    abstentions: float
    base_rows: int
    false_accepts: float | None
