"""Run an experiment, or continue it: `python experiments/run.py text sources`.

configs/EXPERIMENT.toml says what is run. Each run writes a record to results/EXPERIMENT/STAGE, and a run that has one
is skipped.
"""

import argparse
import shlex
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    from harness import drawing, generation, jobs, language, merging, recycled, routing, same_bytes, text, vision

    experiments = {
        "text": {**text.STAGES, "recycled": recycled.jobs, "sized": recycled.sized},
        "language": language.STAGES,
        "tasks": text.TASKS_STAGES,
        "texts": {
            **language.TEXTS_STAGES,
            "generation-rates": generation.rates,
            "generation": generation.targets,
        },
        "merging": merging.STAGES,
        "routing": routing.STAGES,
        "vision": vision.STAGES,
        "diffusion": drawing.STAGES,
        "bytes": same_bytes.STAGES,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=experiments)
    parser.add_argument("stages", nargs="*", help="all of them, in their order, if none is named")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the runs, done or not, and run nothing")
    options = parser.parse_args()
    stages = experiments[options.experiment]
    unknown = set(options.stages) - set(stages)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))} in {options.experiment}: {', '.join(stages)}")
    config = tomllib.loads((HERE / "configs" / f"{options.experiment}.toml").read_text("utf-8"))
    command = f"python experiments/run.py {options.experiment}"
    failed = 0
    for stage in options.stages or stages:
        selected = [job for job in stages[stage](config) if options.only in job.name]
        if options.list:
            for job in selected:
                print("done" if job.done() else "    ", job.name)
            continue
        print(f"{options.experiment} {stage}: ", end="")
        failed += jobs.run(selected, f"{command} {shlex.quote(stage)}", workers=options.workers, estimate=30)
    return 1 if failed else 0


if __name__ == "__main__":
    from harness.jobs import check_environment

    check_environment()
    sys.exit(main())
