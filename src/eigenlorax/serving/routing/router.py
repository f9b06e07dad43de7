"""`Router`: the adapter of each request, or the base model."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...core import keys
from ...core.options import name_list, to_int
from ...errors import OptionError
from ...pack.pack import Pack
from ...search.match import TOP, Match, check_top
from ..bank import AdapterBank
from . import router_file
from .calibration import (
    SIGNALS,
    Calibration,
    abstention_target,
    choose_threshold,
    choose_weights,
    combine,
    fit_temperature,
)
from .centroids import Centroids, fit_centroids
from .classifier import LinearClassifier, fit_classifier
from .decisions import decide, routing_figures
from .encoder import Embed, TextEncoder, make_encoder, unit_embeddings
from .prototypes import PackPrototypes, pack_prototypes
from .router_file import BASE_MODEL, FORMAT_VERSION, FUNCTION, UNKNOWN, RouterFields, RouterState
from .routes import Route, RoutingFigures
from .rows import check_rows, check_texts
from .standardisation import Standardisation, prototype_scores, standardise_on

Rows = Mapping[str, Sequence[str] | Tensor]


class Router:
    """The adapter of a pack that each text belongs to, or none.

    There are up to three signals. *Prototypes* need the pack and the base model alone: how well the inputs of its
    modules fit the leading right singular vector of each adapter's update (Arrow, arXiv 2405.11157). *Centroids*
    (`add_centroids`) and a *classifier* (`train`) need texts of each adapter, and compare embeddings. `calibrate`
    chooses, on held-out texts, which signals are combined, and from which confidence on a text is routed; all other
    texts go to the base model. A router that was not calibrated uses one signal, the first that it has of centroids,
    classifier and prototypes, and never abstains.

    Create one by `from_pack` or `load`.

    Example:
        >>> rows = {"a": ["red", "pink"], "b": ["cat", "dog"]}
        >>> where = {"red": (1.0, 0.1), "pink": (0.9, 0.2), "cat": (0.1, 1.0), "dog": (0.2, 0.9), "rose": (0.8, 0.1)}
        >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"], embed=lambda texts: [where[text] for text in texts])
        >>> router.add_centroids(rows)
        >>> [route.adapter for route in router.route(["rose", "dog"])]
        ['a', 'b']
    """

    def __init__(self, encoder: TextEncoder, names: Sequence[str]) -> None:
        self._encoder = encoder
        self._names = tuple(names)
        self._prototypes: PackPrototypes | None = None
        self._centroids: Centroids | None = None
        self._classifier: LinearClassifier | None = None
        self._standardisation: Standardisation | None = None
        self._calibration: Calibration | None = None

    @classmethod
    def from_pack(
        cls,
        pack: Pack | str | os.PathLike[str],
        adapters: str | Sequence[str] | None = None,
        *,
        model: nn.Module | AdapterBank | None = None,
        tokenizer: Any = None,
        embed: Embed | None = None,
    ) -> "Router":
        """Return a router for adapters of a pack.

        Args:
            pack: The pack, its folder, or a repository on the Hub.
            adapters: The adapters to choose from. Default: all of the pack, without versions of histories.
            model: The base model, or an `AdapterBank` on it. Prototypes need it, and it embeds texts: by the mean of
                its last hidden states. Its first 512 tokens of a text are read.
            tokenizer: Tokenizer of the base model.
            embed: Function from a list of texts to embeddings (texts, d), such as `SentenceTransformer.encode`. Without
                `model`, there are no prototypes.

        Raises:
            AdapterNameError: The pack has no adapter of a name.
            OptionError: There is no adapter, or only one of `model` and `tokenizer`.

        Example:
            >>> eigenlorax.Router.from_pack(pack, ["a", "b"]).names
            ['a', 'b']
        """
        opened = pack if isinstance(pack, Pack) else Pack.from_pretrained(pack)
        names = opened.names if adapters is None else list(dict.fromkeys(name_list(adapters)))
        for name in names:
            keys.check_known(name, opened.names)
        if not names:
            raise OptionError("there is no adapter to route to: the pack has none, or adapters is empty.")
        return cls(make_encoder(opened, model, tokenizer, embed), names)

    def __repr__(self) -> str:
        state = "calibrated" if self._calibration is not None else "not calibrated"
        return f"<Router of {len(self._names)} adapters by {', '.join(self.signals) or 'no signal'}, {state}>"

    @property
    def names(self) -> list[str]:
        """The adapters."""
        return list(self._names)

    @property
    def signals(self) -> list[str]:
        """The signals that the router has: of "centroids", "classifier" and "prototypes"."""
        has = {
            "centroids": self._centroids is not None,
            "classifier": self._classifier is not None,
            "prototypes": self._encoder.model is not None,
        }
        return [signal for signal in SIGNALS if has[signal]]

    @property
    def calibration(self) -> Calibration | None:
        """Weights of the signals, kind of confidence and threshold; None before `calibrate`."""
        return self._calibration

    def add_centroids(self, rows: Rows, *, per_adapter: int = 16) -> None:
        """Add centroids of embedded texts, in place of earlier ones. The calibration is discarded.

        The score of an adapter is the cosine of a text with the closest one of its centroids.

        Args:
            rows: Texts of each adapter, or embeddings (rows, d) as a tensor, which must be those of the same model. A
                few dozen per adapter are enough.
            per_adapter: Maximum number of centroids per adapter, found by k-means. Defaults to 16.

        Raises:
            AdapterNameError: The router has no adapter of a name.
            OptionError: An adapter has no rows, or the router has neither a model nor `embed`.
            ShapeError, NonFiniteError: Embeddings have another shape, or are not finite.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"])
            >>> router.add_centroids({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:]})
            >>> router.signals
            ['centroids']
        """
        if to_int("per_adapter", per_adapter) < 1:
            raise OptionError(f"per_adapter must be at least 1, got {per_adapter}.")
        self._centroids = fit_centroids(self._embed(rows), per_adapter)
        self._calibration = self._standardisation = None

    def train(self, rows: Rows) -> None:
        """Train a linear classifier of embedded texts, in place of an earlier one. The calibration is discarded.

        It is scikit-learn's logistic regression.

        Args:
            rows: Texts or embeddings of each adapter, as in `add_centroids`.

        Raises:
            AdapterNameError: The router has no adapter of a name.
            OptionError: An adapter has no rows, or there is only one adapter.
            MissingExtraError: scikit-learn is not installed.
            ShapeError, NonFiniteError: Embeddings have another shape, or are not finite.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"])
            >>> router.train({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:]})
            >>> router.signals
            ['classifier']
        """
        if len(self._names) == 1:
            raise OptionError(
                f"a classifier needs at least two adapters, and the router has {self._names[0]!r} alone. Use centroids "
                "and calibrate with base_rows."
            )
        self._classifier = fit_classifier(self._embed(rows))
        self._calibration = self._standardisation = None

    def calibrate(
        self,
        rows: Mapping[str, Sequence[str]],
        base_rows: Sequence[str] | None = None,
        *,
        max_false_accepts: float | None = None,
        max_abstentions: float | None = None,
    ) -> RoutingFigures:
        """Choose the combination of signals and the threshold, and return the figures on these rows.

        Of the single signals and of weighted combinations, the one that finds the right adapter of most rows is taken.
        The threshold is that of the largest mean of two shares: of rows that are routed to their adapter, and of base
        rows that are not routed. With a target, it is the best threshold that keeps it. Without base rows, it is such
        that at most 5 % of the rows abstain.

        Args:
            rows: Held-out texts of each adapter: not those of `add_centroids` and `train`, on which all signals look
                better than they are.
            base_rows: Held-out texts that belong to no adapter, which the base model should answer.
            max_false_accepts: Largest share of the base rows that may be routed, above 0 and below 1.
            max_abstentions: Largest share of the rows that may go to the base model, at least 0 and below 1.

        Raises:
            AdapterNameError: The router has no adapter of a name.
            OptionError: There are no rows, the router has no signal, or a target cannot be reached.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"], embed=lambda texts: torch.eye(3)[: len(texts)])
            >>> router.add_centroids({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:2]})
            >>> router.calibrate({"a": ["red"], "b": ["cat"]}, max_abstentions=0.0).accuracy
            1.0
        """
        target = abstention_target(base_rows, max_false_accepts, max_abstentions)
        signals = self._check_signals(self.signals)
        texts, owners = self._labelled(rows)
        base_texts = None if base_rows is None else check_texts(base_rows, "base_rows")
        features = self._encoder.encode(texts, self._prototypes_for(signals))
        standardisation = None if features.cosines is None else standardise_on(features.cosines)
        scores = self._scores_of(features.embeddings, features.cosines, signals, standardisation)
        temperatures = {signal: fit_temperature(scores[signal], owners) for signal in signals}
        weights = choose_weights(scores, temperatures, owners)
        base = None
        if base_texts is not None:
            features = self._encoder.encode(base_texts, self._prototypes_for(signals))
            base_scores = self._scores_of(features.embeddings, features.cosines, signals, standardisation)
            base = base_scores, combine(base_scores, temperatures, weights)
        combined = combine(scores, temperatures, weights)
        kind, threshold = choose_threshold(scores, combined, owners, base, target)
        self._standardisation = standardisation
        self._calibration = Calibration(temperatures, weights, kind, threshold)
        return routing_figures(scores, owners, None if base is None else base[0], self._calibration)

    def evaluate(self, rows: Mapping[str, Sequence[str]], base_rows: Sequence[str] | None = None) -> RoutingFigures:
        """Return the figures of the router, and of each of its signals alone, on texts whose adapters are known.

        Args:
            rows: Texts of each adapter, which no other method has seen.
            base_rows: Texts that belong to no adapter.

        Raises:
            AdapterNameError: The router has no adapter of a name.
            OptionError: There are no rows, or the router has no signal.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"], embed=lambda texts: torch.eye(3)[: len(texts)])
            >>> router.add_centroids({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:2]})
            >>> router.evaluate({"a": ["red"], "b": ["cat"]}).signals
            {'centroids': 1.0}
        """
        signals = self._check_signals(self.signals)
        texts, owners = self._labelled(rows)
        base_texts = None if base_rows is None else check_texts(base_rows, "base_rows")
        base = None if base_texts is None else self._scores(base_texts, signals)
        return routing_figures(self._scores(texts, signals), owners, base, self._calibration)

    def route(self, texts: str | Sequence[str], *, top: int = 1) -> list[Route]:
        """Return the route of each text: an adapter, or None for the base model.

        Args:
            texts: A text, or several. Blank texts go to the base model.
            top: Number of adapters in `Route.scores`.

        Raises:
            OptionError: There are no texts, the router has no signal, or `top` is outside its range.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"], embed=lambda texts: torch.eye(3)[: len(texts)])
            >>> router.add_centroids({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:2]})
            >>> router.route("red")[0].adapter
            'a'
        """
        if not 1 <= to_int("top", top) <= len(self._names):
            raise OptionError(
                f"top must be at least 1 and at most the number of adapters, {len(self._names)}; got {top}."
            )
        found = check_texts(name_list(texts) if isinstance(texts, str) else texts, "texts", allows_blank=True)
        signals = self._check_signals(self._used_signals())
        routes = [Route(None, -math.inf, {}, "abstains: the text is blank") for _ in found]
        filled = [number for number, text in enumerate(found) if text.strip()]
        if filled:
            scores = self._scores([found[number] for number in filled], signals)
            for number, route in zip(filled, decide(scores, self._calibration).routes(self._names, top), strict=True):
                routes[number] = route
        return routes

    def rank(self, texts: Sequence[str], *, top: int = TOP) -> list[Match]:
        """Return the adapters whose centroids are closest to a set of texts, such as rows of a new task.

        Args:
            texts: The texts, all of one kind.
            top: Maximum number of results.

        Returns:
            The adapters, the closest first; the score is the mean over the texts of the cosine with the closest
            centroid of the adapter.

        Raises:
            OptionError: There are no texts, one is blank, `top` is below 1, or the router has no centroids.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"], embed=lambda texts: torch.eye(3)[: len(texts)])
            >>> router.add_centroids({"a": torch.eye(3)[:1], "b": torch.eye(3)[1:2]})
            >>> [match.name for match in router.rank(["red"])]
            ['a', 'b']
        """
        top, texts = check_top(top), check_texts(texts, "texts")
        if self._centroids is None:
            raise OptionError("this router has no centroids to compare texts with. Add them by add_centroids.")
        scores = self._scores(texts, ["centroids"])["centroids"]
        closest = torch.bincount(scores.argmax(1), minlength=len(self._names)).tolist()
        matches = [
            Match(
                name,
                score,
                f"Mean cosine {score:.4f} with its closest centroid; {number} of {len(texts)} texts are closest to it.",
            )
            for name, score, number in zip(self._names, scores.mean(0).tolist(), closest, strict=True)
        ]
        return sorted(matches, key=lambda match: (-match.score, match.name))[:top]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the router to a file, and return its path. Prototypes are not in it: the pack has them.

        Args:
            path: The file; `.safetensors` is the usual suffix.
            overwrite: Replace an existing file.

        Raises:
            PackExistsError: The file exists, and `overwrite` is not set.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"])
            >>> router.save("router.safetensors").name
            'router.safetensors'
        """
        fields = RouterFields(
            FORMAT_VERSION,
            self.names,
            self._encoder.pack.info.fingerprint,
            self._embedder(),
            list(self._pack_prototypes().modules) if self._standardisation is not None else [],
            self._calibration,
        )
        state = RouterState(fields, self._centroids, self._classifier, self._standardisation)
        router_file.write(Path(path), state, overwrite=overwrite)
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        pack: Pack | str | os.PathLike[str],
        *,
        model: nn.Module | AdapterBank | None = None,
        tokenizer: Any = None,
        embed: Embed | None = None,
    ) -> "Router":
        """Return the router in a file.

        An adapter that was replaced in the pack since has another prototype: calibrate again.

        Args:
            path: The file.
            pack: The pack of the router's adapters. It may have grown.
            model, tokenizer, embed: As in `from_pack`, the same as when the router was saved.

        Raises:
            FormatError: The file is damaged, or not that of a router.
            AdapterNameError: The pack lacks an adapter of the router.
            OptionError: The file belongs to another pack, a signal that the router uses needs a model, or texts were
                embedded in another way.

        Example:
            >>> router = eigenlorax.Router.from_pack(pack, ["a", "b"])
            >>> path = router.save("router.safetensors")
            >>> eigenlorax.Router.load(path, pack).names
            ['a', 'b']
        """
        state = router_file.read(Path(path))
        router = cls.from_pack(pack, state.fields.adapters, model=model, tokenizer=tokenizer, embed=embed)
        if state.fields.fingerprint not in router._encoder.pack.info.lineage:
            raise OptionError(
                f"{path} is for a pack with the subspace {state.fields.fingerprint[:12]}…, which this pack does not "
                "have. Open that pack, or make the router again."
            )
        router._check_embedder(state.fields.embedder, str(path))
        router._centroids, router._classifier = state.centroids, state.classifier
        router._standardisation, router._calibration = state.standardisation, state.fields.calibration
        if router._calibration is not None:
            router._check_signals(router._used_signals())
        if state.standardisation is not None and model is not None:
            modules = list(router._pack_prototypes().modules)
            if modules != state.fields.modules:
                raise OptionError(
                    f"{path} was calibrated on other modules than the pack's adapters have. Calibrate again."
                )
        return router

    def _embedder(self) -> str:
        if self._encoder.embed is not None:
            return FUNCTION
        return BASE_MODEL if self._encoder.model is not None else UNKNOWN

    def _check_embedder(self, saved: str, path: str) -> None:
        """Raise `OptionError` if texts would be embedded in another way than when the router was saved."""
        own = self._embedder()
        if UNKNOWN not in (saved, own) and saved != own:
            used = {BASE_MODEL: "the base model: pass model= and tokenizer=", FUNCTION: "a function: pass it as embed="}
            raise OptionError(f"{path}: texts of this router were embedded by {used[saved]}, as in from_pack.")

    def _pack_prototypes(self) -> PackPrototypes:
        if self._prototypes is None:
            # found when they are first needed: all adapters are decoded for it
            self._prototypes = pack_prototypes(self._encoder.pack, self._names)
        return self._prototypes

    def _prototypes_for(self, signals: Sequence[str]) -> PackPrototypes | None:
        return self._pack_prototypes() if "prototypes" in signals else None

    def _used_signals(self) -> list[str]:
        """Return the signals that a route depends on."""
        if self._calibration is None:
            return self.signals[:1]
        used = {*self._calibration.weights, self._calibration.confidence}
        return [signal for signal in SIGNALS if signal in used]

    def _check_signals(self, signals: list[str]) -> list[str]:
        """Return the signals; raise `OptionError` if there is none, or if the router lacks one of them."""
        if not signals:
            raise OptionError(
                "this router has no signal. Pass model= and tokenizer= of the base model for prototypes, or texts of "
                "each adapter to add_centroids or train."
            )
        if "prototypes" in signals and self._encoder.model is None:
            raise OptionError(
                "this router was calibrated with prototypes, which need the base model: pass model= and tokenizer=."
            )
        return signals

    def _embed(self, rows: Rows) -> list[Tensor]:
        """Return unit embeddings of the texts of each adapter, all of one width."""
        checked = check_rows(rows, self._names, needs_all=True)
        texts = [text for each in checked.values() if not isinstance(each, Tensor) for text in each]
        encoded = iter(self._encoder.encode(texts, None).embeddings if texts else ())
        embeddings = [
            unit_embeddings(each, len(each)) if isinstance(each, Tensor) else torch.stack([next(encoded) for _ in each])
            for each in checked.values()
        ]
        for name, each in zip(checked, embeddings, strict=True):
            self._check_width(each, embeddings[0].shape[1], f"embeddings of {name!r}")
        return embeddings

    @staticmethod
    def _check_width(embeddings: Tensor, width: int, what: str) -> None:
        if embeddings.shape[1] != width:
            raise OptionError(
                f"{what} have {embeddings.shape[1]} columns, others {width}. They come from different models: use one."
            )

    def _labelled(self, rows: Mapping[str, Sequence[str]]) -> tuple[list[str], Tensor]:
        """Return all texts, and the index of the adapter of each one."""
        checked = check_rows(rows, self._names, needs_all=False)
        for name, texts in checked.items():
            if isinstance(texts, Tensor):
                raise OptionError(f"rows of {name!r} are a tensor. Pass texts: prototypes need them, not embeddings.")
        texts = [text for each in checked.values() for text in each]
        owners = [self._names.index(name) for name, each in checked.items() for _ in each]
        return texts, torch.tensor(owners)

    def _scores(self, texts: Sequence[str], signals: Sequence[str]) -> dict[str, Tensor]:
        """Return the scores of each signal, (rows, adapters)."""
        features = self._encoder.encode(texts, self._prototypes_for(signals))
        return self._scores_of(features.embeddings, features.cosines, signals, self._standardisation)

    def _scores_of(
        self,
        embeddings: Tensor,
        cosines: Tensor | None,
        signals: Sequence[str],
        standardisation: Standardisation | None,
    ) -> dict[str, Tensor]:
        scores = {}
        if self._centroids is not None and "centroids" in signals:
            self._check_width(embeddings, self._centroids.centres.shape[1], "embeddings")
            scores["centroids"] = self._centroids.scores(embeddings)
        if self._classifier is not None and "classifier" in signals:
            self._check_width(embeddings, self._classifier.weight.shape[1], "embeddings")
            scores["classifier"] = self._classifier.scores(embeddings)
        if cosines is not None:
            scores["prototypes"] = prototype_scores(cosines, self._pack_prototypes().has_module(), standardisation)
        return scores
