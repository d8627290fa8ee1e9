"""Records in a cache of tokens, and what is read back."""

import json
from pathlib import Path

from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.preferences import Preferences, PreferencesConfig
from openqwen.train.sft import Demonstrations
from openqwen.train.trainer import Place


def tokenizer():
    return train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))


def turn(role, text):
    return [{"role": role, "content": text}]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def demonstrations(path, count):
    answers = ["one " * (n % 7 + 1) for n in range(count)]
    talks = [turn("user", f"Say {n}.") + turn("assistant", said) for n, said in enumerate(answers)]
    return write(path, [{"messages": talk} for talk in talks])


def preferences(path, count):
    """Pairs of three prompts in turn; every fifth is of a hot sample."""
    return write(
        path,
        [
            {
                "prompt": turn("user", f"Say {n % 3}."),
                "chosen": turn("assistant", "one " * (n % 4 + 1)),
                "rejected": turn("assistant", "two " * (n % 2 + 1)),
                "origin": {"temperature": 1.5 if n % 5 == 0 else 0.5},
            }
            for n in range(count)
        ],
    )


def read(source, scratch, made_with=None):
    place = Place(Path("nowhere"), scratch, 0, "test")
    return Demonstrations.read(source, made_with or tokenizer(), 512, "leave out", place)


def samples_of(source, scratch):
    data = read(source, scratch)
    samples = [[part.tolist() for part in sample] for sample in data.samples()]
    return [samples, [data.record(n) for n in range(len(data))], data.left_out()]


def preferences_of(source, scratch):
    place, config = Place(Path("nowhere"), scratch, 0, "test"), PreferencesConfig()
    data = Preferences.read(source, tokenizer(), config, 512, place, hottest=1.0)
    groups = [[g.prompt, g.answers, [list(pair) for pair in g.pairs]] for g in data]
    return [groups, data.counts, data.sizes.tolist(), data.answers.tolist()]


READERS = {"sft": samples_of, "dpo": preferences_of}
