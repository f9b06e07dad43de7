"""The result of `routing.py` in Markdown."""

from typing import Any

from markdown_table import table

Json = dict[str, Any]


def markdown(result: Json) -> str:
    """Which adapter is chosen, what is answered then, and which texts of no adapter are routed."""
    choices = [[name, f"{share:.3f}"] for name, share in result["top1"].items()]
    choices.insert(-1, ["nearest neighbour of the embedding", f"{result['top1_nearest']:.3f}"])
    answers = [[name, f"{accuracy:.3f}"] for name, accuracy in result["accuracy"].items()]
    given = [[f"{name}, head given", f"{accuracy:.3f}"] for name, accuracy in result["accuracy_with_heads"].items()]
    rows, where = result["rows"], result["environment"]
    weights = ", ".join(f"{name} {weight:.2f}" for name, weight in result["weights"].items())
    new = ", ".join(f"{task} {share:.2f}" for task, share in result["false_accepts_new"].items())
    return (
        f"{table(('adapter found by', 'share of the test texts'), choices)}\n\n"
        f"{table(('answers', 'accuracy, mean over tasks'), [*answers, *given])}\n\n"
        f"{len(result['adapters'])} adapters of the demo, one a task; {rows['learn']} texts of each task to learn "
        f"from, {rows['calibrate']} to calibrate on, {rows['test']} to test. Calibrated weights: {weights}. With the "
        f"threshold {result['reached']:.2f} of the test texts reach their adapter and {result['abstentions']:.2f} go "
        "to the base model, which counts as a wrong answer. Of texts of no adapter, routed: "
        f"{result['false_accepts_known']:.2f} on the data sets of the calibration, and of others: {new}. "
        f"`python benchmarks/routing.py`; {where['processor']}, torch {where['torch']}."
    )
