"""A small vocabulary of GPT-2's kind, made of texts that are hard to tokenize."""

import pytest

HARD = [
    "Hello world, it's 2024!\n\n  It isn't   over:\tfoo(bar)[0] += 1e-3\r\n",
    "naïve café, 三体, Здравствуй мир, 👩‍🚀 \u00a0\u3000 end ",
    "a <|endoftext|> in a document is text; <s> and </s> too",
    " \n \n",
    "x",
    "def f(x):\n    return x  # the end\n" * 50,
]


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small GPT-2-like vocabulary, as ``VOCAB.json,MERGES.txt``."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(HARD, vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    return ",".join(bpe.save_model(str(folder)))
