"""Measure whether adapters of many users that start from one trained adapter can be stored in a few kilobytes each.

python experiments/run.py vision pretrain    # the base model of images
python experiments/populations.py            # writes results/populations.json; goes on where it was stopped

Decided before a test user of these two populations was trained, after trials on tuning users (LOG.md):

- Two populations of 100 test users each (`harness/population_users.py`): sentences of sst5 with personal thresholds and
  topics on MiniLM, and digits of MNIST in personal handwriting on a small ViT that has seen printed letters and digits.
- A common LoRA (r = 8, query and value) with its head is trained on pooled rows of 150 other users. Each user then has
  50 to 200 rows, and the same steps for every method: 24 of 16 rows, or 40 of 16.
- Methods: the common adapter alone; the common adapter with a head trained by the user; the user's LoRA, trained from
  the common one; a LoRA from scratch; the difference of the user's LoRA to the common one in 8, 4, 2 and 1 kB (1 kB =
  1,000 bytes), head included, each user alone, and over bases of 30 other users; coefficients (r = 8, k = 32) of the
  difference over the same bases.
- The head is coded as a difference to the common head, with a relative error of that difference of 0.1, 0.2, 0.3 and
  0.3; the update gets the bytes that are left.
- Learning rates are chosen on 6 tuning users by mean accuracy, the lowest of equal ones, by factors of 3 until the best
  is not at the edge. Test users are looked at once.
- Figures: mean accuracy on held-out rows; gain over the common adapter, user by user, with the standard error over
  users; share = mean gain of a coding ÷ mean gain of the users' own LoRAs, with a standard error from 1,000 draws of
  users.
- Cut afterwards, for want of time: on sst5, only the first 25 users from scratch, and nothing over bases of others.
- Question: does coding in 8 kB, each user alone, keep at least 98 % of the gain?
"""

import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import population_coding as coding
from harness import population_training as training
from harness import record
from harness.population_training import CoefficientModel, LoRAModel, Weights
from harness.population_users import POPULATIONS, WORK, Population, User

import eigenlorax as ex
from eigenlorax.codec.svd_batch import SvdBatch

Json = dict[str, Any]
Train = Callable[[str, "User", float], Json]
"""Trains a method for a user at a learning rate, and returns the scores."""

COMMAND = "python experiments/populations.py"
RESULT = record.RESULTS / "populations.json"
TEST_USERS, FIT_USERS, TUNING_USERS = 100, 30, 6
BUDGETS = {8000: 0.1, 4000: 0.2, 2000: 0.3, 1000: 0.3}
"""Bytes of a user, and the relative error of the difference of heads."""
COMPONENTS = 32
START_RATES = {
    "own": (1e-3, 3e-3, 9e-3),
    "scratch": (3e-3, 9e-3, 2.7e-2),
    "head": (5e-3, 1.5e-2, 4.5e-2),
    "coefficients": (2e-2, 6e-2, 1.8e-1),
}
RATE_FACTOR = 3
CODED_RANK = 3 * training.RANK
"""Rank of a common update beside a decoded difference, which has the ranks of two LoRAs."""


def main() -> None:
    """Measure both populations, and write one record."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    experiments = [Experiment(population) for population in POPULATIONS]
    measured = {experiment.population.name: experiment.run() for experiment in experiments}
    config = {
        "users": {
            "test": TEST_USERS,
            "fit": FIT_USERS,
            "tuning": TUNING_USERS,
        },
        "budgets": {str(limit): error for limit, error in BUDGETS.items()},
        "components": COMPONENTS,
    }
    record.write(RESULT, {**record.about("populations", config, COMMAND, started), "populations": measured})


class Experiment:
    """One population: its common adapter, its users' trainings and their coding, each step in a file of its own.

    Args:
        population: The data set.
    """

    def __init__(self, population: Population) -> None:
        self.population = population
        self.settings = population.settings
        self.work = WORK / population.name
        self.trainer = LoRAModel(population, self.settings.n_labels)
        self.judge = LoRAModel(population, self.settings.n_labels, CODED_RANK)
        self.common = self._common()

    def run(self) -> Json:
        """Do what has not been done yet, and return the population's part of the record."""
        tried: Json = {}
        methods = {"common": self.test("common", self.score_common, 0.0)}
        for method in ("head", "own"):
            tried[method] = self.tune(method, self.train_and_score)
            methods[method] = self.test(method, self.train_and_score, best_rate(tried[method]))
        own_rate = best_rate(tried["own"])
        own = [self.own(user, own_rate) for user in self.test_users()]
        empty = coding.empty_bases(coding.svd_batches(own[:1], self.common))
        methods |= {f"coded-{limit}": self.code(f"coded-{limit}", own, lambda: empty, limit) for limit in BUDGETS}
        tried["scratch"] = self.tune("scratch", self.train_and_score)
        n_users = self.settings.scratch_users
        methods["scratch"] = self.test("scratch", self.train_and_score, best_rate(tried["scratch"]), n_users)
        numbers = {
            "lora": sum(down.numel() + up.numel() for down, up in self.common.factors.values()),
            "head": self.common.head.numel(),
        }
        if self.settings.has_bases:
            numbers |= self.test_bases(own, own_rate, tried, methods)
        return {
            "rates": tried,
            "numbers": numbers,
            **self.about_users(own),
            "methods": methods,
        }

    def test_bases(self, own: list[Weights], own_rate: float, tried: Json, methods: Json) -> Json:
        """Measure codings and coefficients over bases of other users.

        Args:
            own: Own LoRAs of the test users.
            own_rate: Their learning rate.
            tried, methods: Accuracies by learning rate, and scores, by method, which are added to.

        Returns:
            How many numbers the bases and the coefficients have.
        """
        others = [self.own(user, own_rate) for user in self.users("fit", FIT_USERS)]
        batches, pack = coding.svd_batches(others, self.common), self.fit(others)
        for limit in BUDGETS:
            name = f"coded-{limit}-bases"
            methods[name] = self.code(name, own, lambda limit=limit: self.shared_bases(batches, pack, limit), limit)
        model = CoefficientModel(self.population, self.common, pack)

        def train(_: str, user: User, rate: float) -> Json:
            model.train(self.common.head, user.train, rate, user.seed)
            return self.score(model, user)

        tried["coefficients"] = self.tune("coefficients", train)
        methods["coefficients"] = self.test("coefficients", train, best_rate(tried["coefficients"]))
        sides = [side for bases in pack.subspace.modules.values() for side in (bases.down, bases.up)]
        return {
            "pack": sum(side.components.numel() for side in sides),
            "coefficients": training.RANK * sum(side.k for side in sides),
        }

    def about_users(self, own: list[Weights]) -> Json:
        """Return how many rows the test users have, and how far their LoRAs are from the common adapter."""
        users = self.test_users()
        common_square = coding.squared_norm(self.common.factors)
        squares = [coding.squared_norm(training.difference(lora.factors, self.common.factors)) for lora in own]
        return {
            "train_rows": [len(user.train) for user in users],
            "held_out_rows": [len(user.held_out) for user in users],
            "difference_norm": [round((square / common_square) ** 0.5, 4) for square in squares],
        }

    def test_users(self) -> list[User]:
        """Return the test users."""
        return self.users("test", TEST_USERS)

    def users(self, role: str, n: int) -> list[User]:
        """Return the first users of a role."""
        return [self.population.user(role, index) for index in range(n)]

    def test(self, method: str, train: Train, rate: float, n_users: int = TEST_USERS) -> Json:
        """Train a method for test users, once, and return their scores."""
        scores = []
        for user in self.users("test", n_users):
            scores.append(self.cached(f"test/{method}-{user.name}", lambda user=user: train(method, user, rate)))
            print(f"{self.population.name} {method} {user.name}: {scores[-1]['accuracy']:.3f}", flush=True)
        return column(scores)

    def score_common(self, _: str, user: User, rate: float) -> Json:
        """Return the scores of the common adapter, which has no learning rate."""
        return self.score_weights(self.common, user)

    def _common(self) -> Weights:
        """Return the common adapter, trained on the pooled rows of other users."""
        path = self.work / "common.safetensors"
        if not path.is_file():
            rows = self.population.common_rows()
            start = self.trainer.new_weights(0)
            self.trainer.train(start, rows, self.settings.common_rate, 0, common=True).save(path)
        return Weights.load(path)

    def cached(self, name: str, compute: Callable[[], Json]) -> Json:
        """Return what a file says, or compute and write it."""
        path = self.work / f"{name}.json"
        if not path.is_file():
            record.write(path, compute())
        return record.read(path)

    def own(self, user: User, rate: float) -> Weights:
        """Return a user's own LoRA, trained from the common adapter."""
        path = self.work / "own" / f"{user.name}-{rate:g}.safetensors"
        if not path.is_file():
            self.trainer.train(self.common, user.train, rate, user.seed).save(path)
        return Weights.load(path)

    def score_weights(self, weights: Weights, user: User) -> Json:
        """Return the scores of an adapter on a user's held-out rows."""
        self.judge.set(weights)
        return self.score(self.judge, user)

    def score(self, model: LoRAModel | CoefficientModel, user: User) -> Json:
        return training.scores(training.logits(model.model, self.population, user.held_out), user.held_out)

    def train_and_score(self, method: str, user: User, rate: float) -> Json:
        """Train a method for a user, and return its scores."""
        if method == "head":
            return training.scores(training.train_head(self.judge, self.common, user, rate), user.held_out)
        if method == "own":
            return self.score_weights(self.own(user, rate), user)
        start = self.trainer.new_weights(1)
        return self.score_weights(self.trainer.train(start, user.train, rate, user.seed), user)

    def tune(self, method: str, train: Train) -> Json:
        """Return the mean accuracy of the tuning users by learning rate, beyond the start until the best is inside."""
        accuracies: dict[float, float] = {}
        users = self.users("tuning", TUNING_USERS)
        rates = list(START_RATES[method])
        while rates:
            for rate in rates:
                name = f"tuning/{method}-{rate:g}"
                scores = self.cached(name, lambda rate=rate: column([train(method, user, rate) for user in users]))
                accuracies[rate] = sum(scores["accuracy"]) / TUNING_USERS
                print(f"{self.population.name} {name}: {accuracies[rate]:.4f}", flush=True)
            best = best_rate(accuracies)
            edges = {min(accuracies): best / RATE_FACTOR, max(accuracies): best * RATE_FACTOR}
            # rounded, so that a rate is the same number in the record
            rates = [float(f"{beyond:.3g}") for edge, beyond in edges.items() if edge == best]
        return {f"{rate:g}": accuracies[rate] for rate in sorted(accuracies)}

    def fit(self, others: list[Weights]) -> ex.Pack:
        """Fit a pack to the differences of other users to the common adapter."""
        adapters = [
            ex.from_factors(
                f"user-{index:02d}", coding.lora_factors(training.difference(user.factors, self.common.factors))
            )
            for index, user in enumerate(others)
        ]
        return ex.fit(adapters, n_components=COMPONENTS, dtype="float16", warn_above=1.0)

    def shared_bases(self, others: Mapping[str, SvdBatch], pack: ex.Pack, limit: int) -> coding.Bases:
        """Quantise the pack's bases for users of so many bytes each."""
        empty = coding.empty_bases(others)
        ranks = {name: int(batch.ranks[0]) for name, batch in others.items()}
        # a step size that such a budget allows, from users who are not tested
        alone = coding.encode_within(others, empty, torch.full((FIT_USERS,), limit))
        step_sizes = torch.tensor([coding.decode(data, empty, ranks)[1] for data in alone])
        return coding.pack_bases(pack, others, float(step_sizes.median()), TEST_USERS)

    def code(self, name: str, own: list[Weights], make_bases: Callable[[], coding.Bases], limit: int) -> Json:
        """Code all test users within a budget, and score what is decoded."""

        def measure() -> Json:
            bases = make_bases()
            coded = coding.code_users(own, self.common, bases, limit, BUDGETS[limit])
            scores = []
            for user, member in zip(self.test_users(), coded, strict=True):
                factors = training.added(self.common.factors, member.weights.factors)
                scores.append(self.score_weights(Weights(factors, member.weights.head), user))
            return {
                **column(scores),
                "update_bytes": [member.update_bytes for member in coded],
                "head_bytes": [member.head_bytes for member in coded],
                "error": [round(member.error, 4) for member in coded],
                "bases_bytes": coding.bases_size(bases),
            }

        outcome = self.cached(name, measure)
        print(f"{self.population.name} {name}: {sum(outcome['accuracy']) / len(own):.4f}", flush=True)
        return outcome


def column(scores: list[Json]) -> Json:
    """Return lists of scores in place of a list of users."""
    return {name: [round(score[name], 5) for score in scores] for name in scores[0]}


def best_rate(accuracies: Mapping[Any, float]) -> float:
    """Return the learning rate of the highest accuracy, the lowest of equal ones."""
    return min((-accuracy, float(rate)) for rate, accuracy in accuracies.items())[1]


if __name__ == "__main__":
    main()
