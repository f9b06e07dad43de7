"""What pytest is told for the run: subspaces for our rows, what is left out and why, and a count of it all by part."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_tests import (
    test_decoder_models,
    test_encoder_decoder_models,
    test_feature_extraction_models,
    testing_common,
)

from . import packs, subject
from .foreign import FOREIGN

PARTS = {
    "TestPeftCustomModel": "custom models",
    "TestRequiresGrad": "custom models",
    "TestMultipleActiveAdapters": "several active adapters",
    "TestMixedAdapterBatches": "mixed batches",
    "TestPeftFsdpStateDict": "FSDP state dict",
    "TestDecoderModels": "decoder",
    "TestEncoderDecoderModels": "encoder-decoder",
    "TestPeftFeatureExtractionModel": "feature extraction",
    "TestSequenceClassificationModels": "sequence classification",
    "TestPeftConfig": "config",
    "TestQuantization": "quantisation",
}
OTHERS = "other methods, in the same classes"
BEAMS = "test_generate_with_mixed_adapter_batches"
MIXED = ("test_mixed_adapter_batches", BEAMS)


class Suite:
    """One run."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.skips: Counter[str] = Counter()
        self.left_out: dict[str, str] = {}
        self.others: set[str] = set()

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Leave out what is named in `foreign.py`; in a quick run, all that is not about the method on trial."""
        kept, dropped = [], []
        for item in items:
            name = f"{item.cls.__name__}.{item.originalname}"
            ours = subject.concerns(list(_params(item).values()))
            if not ours:
                self.others.add(item.nodeid)
            if subject.quick and not ours:
                dropped.append(item)
            elif name in FOREIGN:
                self.left_out[name] = FOREIGN[name]
                dropped.append(item)
            else:
                kept.append(item)
        items[:] = kept
        config.hook.pytest_deselected(items=dropped)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Give a row of ours the pack of the model it is combined with: PEFT's lists know no model in a config."""
        params = _params(item)
        if subject.control or params.get("config_cls") is not subject.config_class() or "config_kwargs" not in params:
            return
        if "quant" in params:
            model_id = params["quant"].model_id
        else:
            model_id = params.get("model_id") or test_decoder_models.PEFT_DECODER_MODELS_TO_TEST[0]
        kwargs = {"subspace": packs.folder_of(model_id), **params["config_kwargs"]}
        if item.originalname in MIXED and "OPT" in model_id:
            # before these OPT flattens the batch, which has no rows any more that names could be given to
            kwargs["exclude_modules"] = ["fc1", "fc2"]
        params["config_kwargs"] = kwargs

    @pytest.fixture(autouse=True)
    def _lists_of_classes(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """PEFT skips by lists of classes written into its tests, which cannot name ours: here they do."""
        if subject.control:
            return
        monkeypatch.setattr(testing_common, "_skip_if_conv1d_not_supported", lambda *row: None)
        monkeypatch.setattr(test_feature_extraction_models, "skip_deberta_lora_tests", lambda *row: None)
        # meant for BEFT, it skips Llama and Gemma for all methods
        monkeypatch.setattr(test_decoder_models, "check_beft_config", lambda *row: None)
        if request.node.originalname in MIXED:
            for module in (testing_common, test_decoder_models, test_encoder_decoder_models):
                if getattr(module, "LoraConfig", None) is LoraConfig:
                    monkeypatch.setattr(module, "LoraConfig", subject.config_class())

    @pytest.fixture(autouse=True)
    def _beams_in_float64(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        """Load models in float64 where beams are compared: beams that nearly tie are exchanged by float32 rounding,
        which depends on the size of the batch and on the machine (README.md)."""
        if request.node.originalname == BEAMS and not subject.control:
            auto = request.cls.transformers_class
            in_float64 = SimpleNamespace(from_pretrained=partial(auto.from_pretrained, dtype=torch.float64))
            monkeypatch.setattr(request.cls, "transformers_class", in_float64)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a result."""
        if report.when == "call" or report.outcome != "passed":
            part = OTHERS if report.nodeid in self.others else PARTS[report.nodeid.split("::")[1]]
            self.outcomes[part][report.outcome] += 1
            if report.skipped:
                self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Count a file that skips itself."""
        if report.skipped:
            self.outcomes["quantisation"]["skipped"] += 1
            self.skips[report.longrepr[2].removeprefix("Skipped: ")] += 1

    def failed(self) -> bool:
        """Whether a test of the method on trial did."""
        return any(counts["failed"] for part, counts in self.outcomes.items() if part != OTHERS)

    def summary(self) -> Iterator[str]:
        """A line for each part, then what was skipped, and what was left out."""
        for part in (*dict.fromkeys(PARTS.values()), OTHERS):
            counts = self.outcomes.get(part, {})
            if counts:
                found = ", ".join(f"{counts.get(name, 0)} {name}" for name in ("passed", "failed", "skipped"))
                yield f"{part:{len(OTHERS)}}  {found}"
        if self.skips:
            yield "\nskipped by PEFT's tests:"
            yield from (f"{count:6}  {reason}" for reason, count in self.skips.most_common())
        for reason in dict.fromkeys(self.left_out.values()):
            yield f"\nleft out: {reason}"
            yield from (f"    {name}" for name, why in self.left_out.items() if why == reason)


def _params(item: pytest.Item) -> dict[str, Any]:
    """The row of a parametrised test, as pytest will hand it over."""
    return item.callspec.params if hasattr(item, "callspec") else {}
