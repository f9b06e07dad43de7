"""The adapters of the demo: which task, which share of its rows, which seed, and whose data it is.

Plain records: nothing here trains or reads a file.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Spec:
    """One adapter: the `part`-th of `parts` disjoint shares of a task's training rows, at most `max_rows` of them.

    start_seed: of the random A alone, drawn anew after the head; without it, heads of different sizes shift what one
    seed gives.
    """

    name: str
    task: str
    seed: int
    epochs: int
    learning_rate: float = 2e-3
    part: int = 0
    parts: int = 1
    max_rows: int = 2000
    start_seed: int | None = None


@dataclass(frozen=True, slots=True)
class Collection:
    """Adapters of one run. folder: in the package's data; results: the record of the run, beside this file."""

    folder: str
    results: str
    specs: tuple[Spec, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set comes from, in the words an attribution needs."""

    kind: str
    licence: str
    repository: str
    attribution: str


CLINC = Source(
    "assistant intents",
    "CC BY 3.0",
    "https://github.com/clinc/oos-eval",
    "CLINC150 by Stefan Larson et al. (An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction, "
    "EMNLP-IJCNLP 2019), CC BY 3.0",
)
BANKING = Source(
    "banking questions",
    "CC BY 4.0",
    "https://github.com/PolyAI-LDN/task-specific-datasets",
    "BANKING77 by Iñigo Casanueva et al., PolyAI (Efficient Intent Detection with Dual Sentence Encoders, "
    "NLP for ConvAI 2020), CC BY 4.0",
)
SMS = Source(
    "text messages",
    "CC BY 4.0",
    "https://archive.ics.uci.edu/dataset/228/sms+spam+collection",
    "SMS Spam Collection by Tiago A. Almeida, José María Gómez Hidalgo and Akebo Yamakami (Contributions to the Study "
    "of SMS Spam Filtering: New Collection and Results, DocEng 2011), UCI Machine Learning Repository, CC BY 4.0",
)
TWEETS = Source(
    "tweets",
    "MIT",
    "https://github.com/t-davidson/hate-speech-and-offensive-language",
    "Hate Speech and Offensive Language by Thomas Davidson et al. (Automated Hate Speech Detection and the Problem of "
    "Offensive Language, ICWSM 2017), MIT, Copyright (c) 2017 Tom Davidson",
)
CITATIONS = Source(
    "scientific text",
    "Apache-2.0",
    "https://github.com/allenai/scibert",
    "ACL-ARC citation intents by David Jurgens et al. (Measuring the Evolution of a Scientific Field through Citation "
    "Frames, TACL 2018), as distributed with SciBERT by Iz Beltagy et al. (EMNLP-IJCNLP 2019), Apache-2.0",
)
SOURCES = {
    "clinc_banking": CLINC,
    "clinc_home": CLINC,
    "clinc_kitchen_and_dining": CLINC,
    "clinc_travel": CLINC,
    "clinc_utility": CLINC,
    "clinc_work": CLINC,
    "banking77": BANKING,
    "sms_spam": SMS,
    "hate_davidson": TWEETS,
    "acl_arc": CITATIONS,
}
SPECS = (
    Spec("clinc-banking", "clinc_banking", seed=101, epochs=6),
    Spec("clinc-home", "clinc_home", seed=102, epochs=6),
    Spec("clinc-kitchen-and-dining", "clinc_kitchen_and_dining", seed=103, epochs=6),
    Spec("clinc-travel", "clinc_travel", seed=104, epochs=6),
    Spec("clinc-utility", "clinc_utility", seed=105, epochs=6),
    Spec("clinc-work", "clinc_work", seed=106, epochs=6),
    Spec("banking77-a", "banking77", seed=201, epochs=12, learning_rate=4e-3, part=0, parts=3),
    Spec("banking77-b", "banking77", seed=202, epochs=12, learning_rate=4e-3, part=1, parts=3),
    Spec("banking77-c", "banking77", seed=203, epochs=12, learning_rate=4e-3, part=2, parts=3),
    Spec("sms-spam-a", "sms_spam", seed=301, epochs=4, part=0, parts=2),
    Spec("sms-spam-b", "sms_spam", seed=302, epochs=4, part=1, parts=2),
    Spec("hate-davidson-a", "hate_davidson", seed=401, epochs=4, part=0, parts=3),
    Spec("hate-davidson-b", "hate_davidson", seed=402, epochs=4, part=1, parts=3),
    Spec("hate-davidson-c", "hate_davidson", seed=403, epochs=4, part=2, parts=3),
    Spec("acl-arc-a", "acl_arc", seed=501, epochs=5, part=0, parts=2),
    Spec("acl-arc-b", "acl_arc", seed=502, epochs=5, part=1, parts=2),
)
SEED = 7
SHARED = (
    "clinc-banking",
    "clinc-home",
    "clinc-travel",
    "clinc-work",
    "banking77-a",
    "sms-spam-a",
    "hate-davidson-a",
    "hate-davidson-b",
)
OWN_SEEDS = Collection(".", "results.json", SPECS)
ONE_SEED = Collection(
    "one_seed",
    "results_one_seed.json",
    tuple(replace(spec, seed=SEED, start_seed=SEED) for spec in SPECS if spec.name in SHARED),
)
