"""A folder of short texts, and a tokenizer and a network that are small enough for tests."""

from __future__ import annotations

import random
from pathlib import Path

TOPICS = {
    "animals": "cat dog bird fish horse",
    "colours": "red green blue black white",
    "food": "bread soup cake rice bean",
    "metals": "iron gold tin lead zinc",
    "months": "may june july march april",
    "numbers": "one two three four five",
    "plants": "oak rose fern moss pine",
    "tools": "saw nail drill rope axe",
}
BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}


def write_texts(folder: Path, texts: int = 12, topics: int = 8) -> Path:
    """Write one file per topic, with `%` between different sentences of its words."""
    folder.mkdir()
    draw = random.Random(0)
    for topic, words in list(TOPICS.items())[:topics]:
        sentences: set[str] = set()
        while len(sentences) < texts:
            sentences.add(" ".join(draw.choices(words.split(), k=4)))
        (folder / topic).write_text("\n%\n".join(sorted(sentences)) + "\n%\n")
    return folder


def write_tokenizer(folder: Path) -> Path:
    """Write a tokenizer that knows the words of the topics."""
    from transformers import BertTokenizerFast

    words = [word for words in TOPICS.values() for word in words.split()]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return folder
