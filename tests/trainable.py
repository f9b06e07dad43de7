"""Tiny models on disk with tokenizers, packs for them, and rows with a rule in them that can be learned."""

import json
import random
import shutil

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertModel, GPT2LMHeadModel, PreTrainedTokenizerFast

import eigenlorax as ex
import tiny

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
FILLERS = [f"w{n}" for n in range(12)]
WORDS = [*FILLERS, "good", "bad", "odd", "a", "b", "c", "d", "e", "f"]
VOCABULARY = SPECIAL + WORDS


def make_tokenizer(end=None):
    """Words by white space. `end`: the token after a text; without it, a text stands between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if end is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        special["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    else:
        # as GPT-2's, it has nothing to pad with
        special = {"eos_token": end}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32, **special)


def save_bert(folder, dropout=0.0):
    config = tiny.make_bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    # weights as large as trained ones are: a layer of the usual 0.02 hardly looks at the other words
    config.initializer_range = 0.1
    with torch.random.fork_rng():
        torch.manual_seed(8)
        BertModel(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_gpt2(folder):
    config = tiny.make_gpt2().config
    config.initializer_range = 0.1
    with torch.random.fork_rng():
        torch.manual_seed(8)
        GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(end="[SEP]").save_pretrained(folder)
    return folder


def bert_pack(folder, base, dtype="float32"):
    pack, _ = tiny.make_pack(dict.fromkeys(tiny.BERT, (tiny.IN, tiny.IN)), dtype=dtype)
    pack.base_model = str(base)
    return pack.save(folder)


def gpt2_pack(folder, base):
    pack, _ = tiny.make_pack(tiny.GPT2)
    pack.base_model = str(base)
    return pack.save(folder)


def keyword_rows(n, seed, labels=("bad", "good"), words=4, without=()):
    """The label is that of the one keyword among fillers. without: rows whose texts are not used."""
    chance = random.Random(seed)
    rows, used = [], {row["text"] for row in without}
    while len(rows) < n:
        text = [chance.choice(FILLERS) for _ in range(chance.randint(2, words))]
        number = chance.randrange(len(labels))
        text.insert(chance.randint(0, len(text)), ("bad", "good", "odd")[number])
        if " ".join(text) not in used:
            rows.append({"text": " ".join(text), "label": labels[number]})
    return rows


def cycle_rows(n, seed, lengths=range(4, 13)):
    """After each letter comes the next one, whatever the text begins with. lengths: those that a text may have."""
    chance = random.Random(seed)
    letters = "abcdef"
    rows = []
    for _ in range(n):
        start, length = chance.randrange(6), chance.choice(lengths)
        rows.append({"text": " ".join(letters[(start + i) % 6] for i in range(length))})
    return rows


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_jsonl(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return path


def save_lora(folder, model, config, base):
    """A LoRA of random weights, as if it had been trained on the base model `base`."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        peft_model = get_peft_model(model, config)
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(folder)
    return folder


def save_common(place):
    """A LoRA for two classes on the base model of `pack`, from which users train; its config has no defaults."""
    base = ex.Pack.open(place / "pack").base_model
    config = LoraConfig(r=3, lora_alpha=12, lora_dropout=0.0, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    return save_lora(place / "common", model, config, base)


BASES = ("bert", "dropping-bert", "gpt2")


def make_all(place):
    """Models, packs for them (`pack`, `lm-pack`, of adapters a0 to a3), and rows to train with and for evaluation."""
    bert_pack(place / "pack", save_bert(place / "bert"))
    gpt2_pack(place / "lm-pack", save_gpt2(place / "gpt2"))
    save_bert(place / "dropping-bert", dropout=0.2)
    rows = keyword_rows(192, seed=0)
    write_jsonl(place / "train.jsonl", rows)
    write_jsonl(place / "eval.jsonl", keyword_rows(57, seed=1, without=rows))
    write_jsonl(place / "lm-train.jsonl", cycle_rows(96, seed=0, lengths=range(4, 13, 2)))
    write_jsonl(place / "lm-eval.jsonl", cycle_rows(29, seed=1, lengths=range(5, 12, 2)))
    return place


def copy_all(made, folder):
    """What `make_all` has made, but the models, which stay where they are."""
    for path in made.iterdir():
        if path.name not in BASES:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
