"""Reports on collections of factors, and what they find."""

import eigenlorax as ex
from eigenlorax.core.adapter import LoRAFactors, from_factors


def adapters(collection):
    """a00, a01, … in float32."""
    return [
        from_factors(
            f"a{i:02}",
            {m: LoRAFactors(f.down.float(), f.up.float(), f.scaling, f.kernel) for m, f in one.items()},
            base_model="org/base",
        )
        for i, one in enumerate(collection)
    ]


def report_on(collection, k=8, **options):
    made = adapters(collection)
    return ex.report(ex.fit(made, n_components=k, warn_above=1.0), made, **options)


def names(*places):
    return [f"a{place:02}" for place in places]


def findings(report, kind):
    return [finding for finding in report.verdict.findings if finding.kind == kind]


def the(report, kind):
    (found,) = findings(report, kind)
    return found
