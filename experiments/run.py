"""Runs an experiment, or goes on with it: `python experiments/run.py text sources`.

What is to be run stands in configs/EXPERIMENT.toml; each run leaves a record in results/EXPERIMENT/STAGE, and a run
whose record is there is skipped.
"""

import argparse
import shlex
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    from harness import drawing, jobs, language, recycled, same_bytes, text, vision

    experiments = {
        "text": {**text.STAGES, "recycled": recycled.jobs, "sized": recycled.sized},
        "language": language.STAGES,
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
    asked = parser.parse_args()
    stages = experiments[asked.experiment]
    unknown = set(asked.stages) - set(stages)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))} in {asked.experiment}: {', '.join(stages)}")
    config = tomllib.loads((HERE / "configs" / f"{asked.experiment}.toml").read_text("utf-8"))
    command = f"python experiments/run.py {asked.experiment}"
    failed = 0
    for stage in asked.stages or stages:
        wanted = [job for job in stages[stage](config) if asked.only in job.name]
        if asked.list:
            for job in wanted:
                print("done" if job.done() else "    ", job.name)
            continue
        print(f"{asked.experiment} {stage}: ", end="")
        failed += jobs.run(wanted, f"{command} {shlex.quote(stage)}", workers=asked.workers, estimate=30)
    return 1 if failed else 0


if __name__ == "__main__":
    from harness.jobs import check_environment

    check_environment()
    sys.exit(main())
