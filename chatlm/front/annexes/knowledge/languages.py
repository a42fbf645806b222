"""Is a text mostly in another language than English? A guess by its letters and its commonest words."""

from __future__ import annotations

import re
from collections import Counter

from chatlm.common.config import MULTILINGUAL

SAMPLES = 20             # pieces of a long text that are looked at
SAMPLE_CHARACTERS = 2_000
LEAST_WORDS = 20         # of a text, below which nothing is said
FOREIGN_LETTERS = 0.25   # of all letters, from which on a text is not English
COMMON_WORDS = 0.06      # of all words, from which on those of another language count
MULTILINGUAL_MB = 91     # that its package has
# embedders that were made for English, by their names
ENGLISH_ONLY = re.compile(
    r"(?i)all-minilm|all-mpnet|multi-qa|[-_.]en\b|gte-(small|base|large)\b")
ENGLISH = frozenset("the of and to is that it for was with as this are be have from which you not by or at "
                    "on his her they has had but were there been their if will would can".split())
# the commonest words of languages in Latin letters that English does not have
OTHERS = {language: frozenset(words.split()) for language, words in {
    "German": "der die das und ist nicht ein eine einen den dem von zu mit sich auf im wird oder auch bei",
    "French": "le la les des et est un une dans pour que qui sur pas au du ce il elle sont avec",
    "Spanish": "el la los las y es un una que en por con para del no se su al lo como más",
    "Italian": "il di che è per un una non sono con del della le gli al si lo dal anche",
    "Portuguese": "o os as e é um uma de que não para com do da em no na se por ao",
    "Dutch": "de het een en van is niet dat op te zijn voor met er aan ook maar wordt",
    "Polish": "w i na z się nie do jest to że po od przez dla oraz",
    "Swedish": "och att det som en är på av för inte den med till ett har",
    "Danish": "og at det som en er på af for ikke den med til et har",
    "Finnish": "ja on ei se että oli mutta ovat kun hän myös tai",
    "Turkish": "ve bir bu için de da ile olarak çok daha gibi olan",
    "Indonesian": "yang dan di untuk dengan ini itu dari pada adalah tidak dalam ke",
    "Czech": "a se na je že to v s z do pro jako jsou bylo které",
    "Romanian": "și de în la cu pe un o nu este că din pentru mai sunt",
    "Hungarian": "a az és hogy nem is egy van meg volt csak mint"}.items()}


def is_mostly_foreign(text: str) -> bool:
    """Is a text mostly in another language than English? Tables of numbers, code and short texts are not."""
    text = sample_of(text)
    letters = [letter for letter in text if letter.isalpha()]
    foreign = sum(not letter.isascii() for letter in letters)
    if len(letters) >= LEAST_WORDS and foreign > FOREIGN_LETTERS * len(letters):
        return True
    words = Counter(re.findall(r"[^\W\d_]+", text.lower()))
    total = words.total()
    if total < LEAST_WORDS:
        return False
    english = sum(words[word] for word in ENGLISH)
    other = max(sum(words[word] for word in common) for common in OTHERS.values())
    return other >= COMMON_WORDS * total and other > english


def sample_of(text: str) -> str:
    """Pieces of a long text, from its start to its end."""
    if len(text) <= SAMPLES * SAMPLE_CHARACTERS:
        return text
    step = len(text) // SAMPLES
    return " ".join(text[place:place + SAMPLE_CHARACTERS] for place in range(0, step * SAMPLES, step))


def unread_language(text: str, embedder: str) -> str:
    """What to say of a text that an embedder does not read; "" if it reads it, or nobody knows. embedder: its
    name."""
    if not ENGLISH_ONLY.search(embedder) or not is_mostly_foreign(text):
        return ""
    return (f"most of it is not in English, the only language that {embedder} reads, so searches find only "
            f"passages with the words of the question: start the server with --embedder {MULTILINGUAL} "
            f"({MULTILINGUAL_MB} MB)")
