"""`Router` on planted tasks, with bad input, and from its file."""

import json

import pytest
import torch
from safetensors import safe_open
from torch.nn.functional import normalize

import eigenlorax as ex
import tiny
from eigenlorax.errors import (
    AdapterNameError,
    FormatError,
    NonFiniteError,
    OptionError,
    PackExistsError,
    ShapeError,
)
from eigenlorax.formats import safetensors_file
from eigenlorax.serving.routing.centroids import fit_centroids
from eigenlorax.serving.routing.classifier import fit_classifier
from planted import normal


def texts_of(word, n=12, first=0):
    return [f"{word} {number}" for number in range(first, first + n)]


NAMES = ["a0", "a1"]
# the texts of a0 lie on both sides of those of a1
ROWS = {"a0": texts_of("east") + texts_of("west"), "a1": texts_of("north", 24)}
HELD_OUT = {"a0": texts_of("east", 8, 50) + texts_of("west", 8, 50), "a1": texts_of("north", 16, 50)}
BASE_ROWS = texts_of("south", 10)


@pytest.fixture
def router(pack, embed):
    router = ex.Router.from_pack(pack, NAMES, embed=embed)
    router.add_centroids(ROWS)
    return router


class TestSignals:
    def test_several_centroids_follow_an_adapter_of_several_kinds_of_texts(self, router):
        assert router.evaluate(HELD_OUT).signals == {"centroids": 1.0}
        router.add_centroids(ROWS, per_adapter=1)
        # the mean of east and west is of no direction
        assert router.evaluate(HELD_OUT).signals["centroids"] < 1

    def test_the_classifier(self, pack, embed):
        router = ex.Router.from_pack(pack, ["a0", "a1", "a2"], embed=embed)
        router.train({"a0": texts_of("east"), "a1": texts_of("north"), "a2": texts_of("west", 3)})
        held_out = {"a0": texts_of("east", 5, 50), "a1": texts_of("north", 5, 50), "a2": texts_of("west", 5, 50)}
        assert router.evaluate(held_out).signals == {"classifier": 1.0}

    def test_prototypes_need_the_model_alone(self, pack, model, tokenizer):
        router = ex.Router.from_pack(pack, model=model, tokenizer=tokenizer)
        assert router.signals == ["prototypes"]
        (route,) = router.route("one two three", top=4)
        assert route.adapter in pack.names
        assert sorted(route.scores) == pack.names
        assert sum(route.scores.values()) == pytest.approx(1)
        assert "never abstains" in route.reason

    def test_embeddings_in_place_of_texts(self, pack, embed, router):
        given = ex.Router.from_pack(pack, NAMES, embed=embed)
        given.add_centroids({name: torch.tensor(embed(texts)) for name, texts in ROWS.items()})
        texts = HELD_OUT["a0"] + BASE_ROWS
        assert given.route(texts, top=2) == router.route(texts, top=2)

    @pytest.mark.parametrize("per_adapter", [1, 2, 5, 60])
    def test_centroids_are_local_optima_of_k_means(self, per_adapter):
        rows = torch.nn.functional.normalize(normal(40, 7, seed=per_adapter).float(), dim=1)
        found = fit_centroids([rows, rows[:3]], per_adapter)
        centres = found.centres[found.owners == 0]
        assert len(centres) == min(per_adapter, 40)
        nearest = (rows @ centres.mT).argmax(1)
        for number, centre in enumerate(centres):
            mean = rows[nearest == number].mean(0)
            torch.testing.assert_close(mean / mean.norm(), centre, atol=1e-5, rtol=0)
        cosines = rows @ found.centres.mT
        wanted = torch.stack([cosines[:, found.owners == owner].amax(1) for owner in (0, 1)], dim=1)
        assert torch.equal(found.scores(rows), wanted)

    def test_equal_texts_have_one_centroid(self):
        rows = torch.eye(4)[[1, 1, 1, 2]]
        assert len(fit_centroids([rows], 16).centres) == 2

    @pytest.mark.parametrize("n_adapters", [2, 3])
    def test_the_classifier_is_scikit_learns(self, n_adapters):
        from sklearn.linear_model import LogisticRegression

        rows = [normal(20 + 3 * number, 6, seed=number).float() + number for number in range(n_adapters)]
        joined, mean = torch.cat(rows), torch.cat(rows).mean(0)
        scale = (joined - mean).square().sum(1).mean().sqrt()
        owners = torch.arange(n_adapters).repeat_interleave(torch.tensor([len(each) for each in rows]))
        wanted = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit((joined - mean) / scale, owners)
        found = fit_classifier(rows).scores(joined).softmax(1).double()
        torch.testing.assert_close(
            found, torch.tensor(wanted.predict_proba((joined - mean) / scale)), atol=2e-3, rtol=0
        )


class TestAbstention:
    def test_rows_of_no_adapter_go_to_the_base_model(self, router):
        figures = router.calibrate(HELD_OUT, BASE_ROWS)
        assert (figures.accuracy, figures.routed_right, figures.false_accepts) == (1, 1, 0)
        routes = router.route([*texts_of("south", 3, 90), "east 99", "  "])
        assert [route.adapter for route in routes] == [None] * 3 + ["a0", None]
        assert routes[0].reason.startswith("abstains: centroids ")
        assert "is at least" in routes[3].reason
        assert routes[4].reason == "abstains: the text is blank"
        assert router.evaluate(HELD_OUT, texts_of("south", 5, 90)).false_accepts == 0

    def test_one_adapter_alone(self, pack, embed):
        router = ex.Router.from_pack(pack, "a0", embed=embed)
        router.add_centroids({"a0": ROWS["a0"]})
        figures = router.calibrate({"a0": HELD_OUT["a0"]}, BASE_ROWS)
        assert (figures.routed_right, figures.false_accepts) == (1, 0)
        assert [route.adapter for route in router.route(["east 3", "south 4"])] == ["a0", None]
        with pytest.raises(OptionError, match="at least two adapters, and the router has 'a0' alone"):
            router.train({"a0": ROWS["a0"]})

    def test_one_adapter_alone_by_prototypes(self, pack, model, tokenizer):
        router = ex.Router.from_pack(pack, "a2", model=model, tokenizer=tokenizer)
        router.calibrate({"a2": ["one two", "three"]}, ["four five", "six"])
        assert {route.adapter for route in router.route(["one two", "six"])} <= {"a2", None}

    def test_without_base_rows_five_percent_abstain(self, router):
        figures = router.calibrate({"a0": texts_of("east", 40), "a1": texts_of("north", 40)})
        assert figures.abstentions == 0.05
        assert router.calibrate(HELD_OUT, max_abstentions=0.0).abstentions == 0

    def test_new_signals_end_a_calibration(self, router):
        router.calibrate(HELD_OUT, BASE_ROWS)
        assert router.calibration is not None
        router.train(ROWS)
        assert router.calibration is None
        assert router.route("south 1")[0].adapter in NAMES


class TestBank:
    def test_routes_name_the_rows_of_a_batch(self, pack, model, tokenizer, embed):
        bank = ex.AdapterBank(model, pack)
        router = ex.Router.from_pack(pack, NAMES, embed=embed)
        router.add_centroids(ROWS)
        router.calibrate(HELD_OUT, BASE_ROWS)
        names = [route.adapter for route in router.route(["north 1", "south 2", "east 3"])]
        assert names == ["a1", None, "a0"]
        ids = torch.randint(3, 53, (3, 5), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            mixed = bank(ids, adapter_names=names).logits
            assert torch.equal(mixed, bank(ids, adapter_names=["a1", "__base__", "a0"]).logits)

    def test_the_bank_mixes_the_best_adapters_of_a_text(self, pack, model, tokenizer):
        bank = ex.AdapterBank(model, pack)
        router = ex.Router.from_pack(pack, model=bank, tokenizer=tokenizer)
        best = router.route("one two three", top=3)[0].scores
        ids = torch.randint(3, 53, (1, 5), generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), bank.mixing(list(best), top=2):
            mixed = bank.model(ids).logits
        assert not torch.allclose(mixed, tiny.make_bert()(ids).logits, atol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize(
        ("rows", "error", "message"),
        [
            ({}, OptionError, "2 of the router's 2 adapters have no rows, such as 'a0'"),
            ({"a0": ["x"]}, OptionError, "1 of the router's 2 adapters have no rows, such as 'a1'"),
            ({"a0": ["east"], "a7": ["west"]}, AdapterNameError, "no adapter named 'a7' in the router"),
            ({"a0": ["east"], "a1": []}, OptionError, "rows of 'a1' are empty"),
            ({"a0": ["east"], "a1": torch.empty(0, 3)}, OptionError, "rows of 'a1' are empty"),
            ({"a0": ["east"], "a1": ["west", "\n"]}, OptionError, "rows of 'a1': number 1 is"),
            ({"a0": ["east"], "a1": [{"text": "west"}]}, OptionError, "number 0 is {'text': 'west'}, expected a text"),
            ({"a0": ["east"], "a1": "west"}, OptionError, "must be a list of texts, got str"),
            ({"a0": ["east"], "a1": 3}, OptionError, "must be a list of texts, got int"),
            (["east"], OptionError, "map each adapter's name to its texts, got list"),
            ({"a0": torch.ones(2, 3), "a1": torch.ones(2, 4)}, OptionError, "have 4 columns, others 3"),
            ({"a0": torch.ones(2, 3), "a1": torch.ones(3)}, ShapeError, "expected"),
            ({"a0": torch.ones(2, 3), "a1": torch.full((1, 3), torch.nan)}, NonFiniteError, "NaN"),
        ],
    )
    @pytest.mark.parametrize("method", ["add_centroids", "train"])
    def test_rows_to_learn_from(self, pack, embed, method, rows, error, message):
        router = ex.Router.from_pack(pack, NAMES, embed=embed)
        with pytest.raises(error, match=message):
            getattr(router, method)(rows)
        assert router.signals == []

    @pytest.mark.parametrize(
        ("rows", "base_rows", "options", "error", "message"),
        [
            ({}, None, {}, OptionError, "rows is empty"),
            ({"b": ["east"]}, None, {}, AdapterNameError, "no adapter named 'b'"),
            ({"a0": torch.ones(2, 3)}, None, {}, OptionError, "Pass texts"),
            (HELD_OUT, [], {}, OptionError, "base_rows are empty"),
            (HELD_OUT, BASE_ROWS, {"max_false_accepts": 0.01}, OptionError, "pass at least 100, or allow more"),
            (HELD_OUT, None, {"max_false_accepts": 0.01}, OptionError, "needs base_rows"),
            (HELD_OUT, BASE_ROWS, {"max_false_accepts": 0}, OptionError, "above 0 and below 1, got 0"),
            (HELD_OUT, BASE_ROWS, {"max_false_accepts": float("nan")}, OptionError, "got nan"),
            (HELD_OUT, BASE_ROWS, {"max_abstentions": 1.0}, OptionError, "below 1, got 1"),
            (HELD_OUT, BASE_ROWS, {"max_abstentions": "few"}, OptionError, "must be a number"),
            (HELD_OUT, BASE_ROWS, {"max_abstentions": 0.1, "max_false_accepts": 0.1}, OptionError, "one of them"),
        ],
    )
    def test_calibration(self, router, rows, base_rows, options, error, message):
        with pytest.raises(error, match=message):
            router.calibrate(rows, base_rows, **options)
        assert router.calibration is None

    def test_a_target_that_cannot_be_reached(self, router):
        rows = {"a0": ["east 1"], "a1": ["north 2"]}
        # base rows that lie closer to the centroids than the rows do
        base_rows = [text for texts in ROWS.values() for text in texts]
        with pytest.raises(OptionError, match="no threshold reaches max_false_accepts=0.03"):
            router.calibrate(rows, base_rows, max_false_accepts=0.03)

    @pytest.mark.parametrize(
        ("texts", "top", "message"),
        [([], 1, "texts are empty"), (["a", 3], 1, "number 1 is 3"), ("east", 3, "number of adapters, 2; got 3")],
    )
    def test_texts(self, router, texts, top, message):
        with pytest.raises(OptionError, match=message):
            router.route(texts, top=top)

    def test_adapters(self, pack):
        with pytest.raises(AdapterNameError, match="Did you mean 'a1'"):
            ex.Router.from_pack(pack, ["a0", "a1x"])
        with pytest.raises(OptionError, match="no adapter to route to"):
            ex.Router.from_pack(pack, [])

    def test_a_router_without_signals(self, pack, embed):
        for call in (lambda each: each.route("east"), lambda each: each.calibrate(HELD_OUT)):
            with pytest.raises(OptionError, match="no signal"):
                call(ex.Router.from_pack(pack, NAMES, embed=embed))
        with pytest.raises(OptionError, match="per_adapter must be at least 1"):
            ex.Router.from_pack(pack, NAMES, embed=embed).add_centroids(ROWS, per_adapter=0)

    def test_embeddings_of_another_model(self, router, pack, tmp_path):
        path = router.save(tmp_path / "router.safetensors")
        other = ex.Router.load(path, pack, embed=lambda texts: [[1.0, 2.0]] * len(texts))
        with pytest.raises(OptionError, match="have 2 columns, others 3"):
            other.route("east")


class TestRank:
    def test_adapters_by_the_mean_cosine_with_their_closest_centroids(self, pack, embed, router):
        texts = texts_of("west", 3, 50) + texts_of("north", 1, 50)
        rows = normalize(torch.as_tensor(embed(texts)).float(), dim=1)
        expected = {}
        for name in NAMES:
            alone = ex.Router.from_pack(pack, [name], embed=embed)
            alone.add_centroids({name: ROWS[name]})
            expected[name] = float((rows @ alone._centroids.centres.mT).amax(1).mean())
        found = router.rank(texts)
        assert [match.name for match in found] == ["a0", "a1"]
        assert {match.name: match.score for match in found} == pytest.approx(expected)
        assert found[0].reason.endswith("3 of 4 texts are closest to it.")
        assert router.rank(texts, top=1) == found[:1]

    @pytest.mark.parametrize(
        ("texts", "top", "message"),
        [
            ([], 1, "texts are empty"),
            (["east", " "], 1, "number 1"),
            ("east", 1, "list of texts"),
            (["east"], 0, "top"),
        ],
    )
    def test_bad_input(self, router, texts, top, message):
        with pytest.raises(OptionError, match=message):
            router.rank(texts, top=top)

    def test_without_centroids(self, pack, embed):
        with pytest.raises(OptionError, match="no centroids"):
            ex.Router.from_pack(pack, NAMES, embed=embed).rank(["east"])


class TestFile:
    @pytest.fixture
    def saved(self, pack, model, tokenizer, embed, tmp_path):
        router = ex.Router.from_pack(pack, NAMES, model=model, tokenizer=tokenizer, embed=embed)
        router.add_centroids(ROWS)
        router.train(ROWS)
        router.calibrate(HELD_OUT, BASE_ROWS)
        return router, router.save(tmp_path / "deep" / "router.safetensors")

    def test_it_routes_as_before(self, saved, pack, tokenizer, embed):
        router, path = saved
        texts = HELD_OUT["a0"] + BASE_ROWS
        loaded = ex.Router.load(path, pack, model=tiny.make_bert(), tokenizer=tokenizer, embed=embed)
        assert (loaded.names, loaded.signals) == (router.names, router.signals)
        assert loaded.calibration == router.calibration
        assert loaded.route(texts, top=2) == router.route(texts, top=2)
        assert loaded.evaluate(HELD_OUT, BASE_ROWS) == router.evaluate(HELD_OUT, BASE_ROWS)
        # equal bytes, and again from what was loaded
        assert loaded.save(path.with_name("again")).read_bytes() == path.read_bytes()

    def test_a_router_that_uses_no_prototypes_needs_no_model(self, saved, pack, embed):
        router, path = saved
        assert "prototypes" not in router.calibration.weights
        loaded = ex.Router.load(path, pack, embed=embed)
        assert loaded.route(BASE_ROWS) == router.route(BASE_ROWS)
        assert loaded.save(path.with_name("again")).read_bytes() == path.read_bytes()

    def test_texts_embedded_in_another_way(self, saved, pack, model, tokenizer, embed, tmp_path):
        _, path = saved
        with pytest.raises(OptionError, match="embedded by a function: pass it as embed="):
            ex.Router.load(path, pack, model=model, tokenizer=tokenizer)
        of_model = ex.Router.from_pack(pack, NAMES, model=model, tokenizer=tokenizer)
        of_model.add_centroids({"a0": ["one two"], "a1": ["three"]})
        path = of_model.save(tmp_path / "of-model")
        with pytest.raises(OptionError, match="embedded by the base model: pass model="):
            ex.Router.load(path, pack, embed=embed)
        assert ex.Router.load(path, pack, model=model, tokenizer=tokenizer).rank(["three"])[0].name == "a1"

    def test_of_version_1_which_does_not_say_how_texts_are_embedded(self, saved, pack, embed):
        router, path = saved
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        document = json.loads(metadata["eigenlorax_router"])
        del document["embedder"]
        metadata["eigenlorax_router"] = json.dumps({**document, "format_version": 1})
        path.write_bytes(safetensors_file.to_bytes(tensors, metadata))
        assert ex.Router.load(path, pack, embed=embed).route(BASE_ROWS) == router.route(BASE_ROWS)

    def test_of_a_pack_that_has_grown(self, saved, pack, embed):
        _, path = saved
        assert ex.Router.load(path, pack.augment(2, seed=3), embed=embed).names == NAMES

    def test_of_a_calibration_with_prototypes(self, pack, model, tokenizer, tmp_path):
        router = ex.Router.from_pack(pack, model=model, tokenizer=tokenizer)
        rows = {name: [f"{name} one", f"two {name}"] for name in pack.names}
        router.calibrate(rows, ["three"])
        path = router.save(tmp_path / "router.safetensors")
        loaded = ex.Router.load(path, pack, model=model, tokenizer=tokenizer)
        assert loaded.route(["one", "a3 two"], top=4) == router.route(["one", "a3 two"], top=4)
        with pytest.raises(OptionError, match="calibrated with prototypes, which need the base model"):
            ex.Router.load(path, pack)

    def test_files_are_not_replaced_unless_asked(self, saved):
        router, path = saved
        with pytest.raises(PackExistsError, match="exists"):
            router.save(path)
        assert router.save(path, overwrite=True) == path

    def test_another_pack(self, saved, embed):
        _, path = saved
        other, _ = tiny.make_pack(dict.fromkeys(tiny.BERT, (tiny.IN, tiny.IN)), n_components=5)
        with pytest.raises(OptionError, match="is for a pack with the subspace"):
            ex.Router.load(path, other, embed=embed)
        other.remove("a0")
        with pytest.raises(AdapterNameError, match="a0"):
            ex.Router.load(path, other, embed=embed)

    def test_files_of_other_kinds(self, saved, pack, tmp_path):
        _, path = saved
        with pytest.raises(FormatError, match="there is no file"):
            ex.Router.load(tmp_path / "nowhere", pack)
        for data in (b"", path.read_bytes()[:200], b"\x80\x04pickle" * 9):
            (tmp_path / "damaged").write_bytes(data)
            with pytest.raises(FormatError):
                ex.Router.load(tmp_path / "damaged", pack)
        (tmp_path / "other").write_bytes(safetensors_file.to_bytes({"x": torch.ones(2)}, {}))
        with pytest.raises(FormatError, match="not the file of a router"):
            ex.Router.load(tmp_path / "other", pack)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("format_version", 3, "reads up to 2"),
            ("embedder", "guess", "damaged"),
            ("format_version", "1", "damaged"),
            ("adapters", ["a0", "a1", "a2"], "do not fit its 3 adapters"),
            ("adapters", [], "do not fit its 0 adapters"),
            ("modules", [3], "damaged"),
            ("calibration", {"weights": {}}, "has the fields"),
            ("calibration", ("weights", {"prototypes": 1.0, "guesses": 1.0}), "damaged"),
            ("calibration", ("weights", {}), "damaged"),
            ("calibration", ("confidence", "feeling"), "damaged"),
            ("calibration", ("temperatures", {"centroids": 0.0, "classifier": 1.0}), "damaged"),
        ],
    )
    def test_fields_that_do_not_fit(self, saved, pack, embed, field, value, message):
        _, path = saved
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        document = json.loads(metadata["eigenlorax_router"])
        if isinstance(value, tuple):
            value = {**document[field], value[0]: value[1]}
        metadata["eigenlorax_router"] = json.dumps({**document, field: value})
        path.write_bytes(safetensors_file.to_bytes(tensors, metadata))
        with pytest.raises(FormatError, match=message):
            ex.Router.load(path, pack, embed=embed)

    @pytest.mark.parametrize(
        ("name", "tensor"),
        [
            ("centroids.owners", torch.zeros(3, dtype=torch.int64)),
            ("classifier.bias", torch.zeros(3)),
            ("standardisation.mean", torch.zeros(3)),
            ("classifier.more", torch.zeros(3)),
        ],
    )
    def test_tensors_that_do_not_fit(self, saved, pack, embed, name, tensor):
        _, path = saved
        with safe_open(path, "pt") as file:
            tensors, metadata = {each: file.get_tensor(each) for each in file.keys()}, file.metadata()  # noqa: SIM118
        path.write_bytes(safetensors_file.to_bytes({**tensors, name: tensor}, metadata))
        with pytest.raises(FormatError, match="router"):
            ex.Router.load(path, pack, embed=embed)
