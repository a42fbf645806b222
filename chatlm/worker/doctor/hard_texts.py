"""Short texts that tokenizers disagree about: for round trips, and for fingerprints.

Their order is part of the fingerprints in known_tokenizers.py: after a change, run docs/fingerprints.py."""

from __future__ import annotations

import itertools

SCRIPTS = (  # "All people are born free" or the like, in scripts that word patterns treat differently
    "All human beings are born free and equal.", "Tous les êtres humains naissent libres et égaux.",
    "Alle Menschen sind frei und gleich an Würde geboren, größer als 3 Ößchen.",
    "Wszyscy ludzie rodzą się wolni.", "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "İnsanlar eşit doğar; ışık, ğ, Ş.", "Все люди рождаются свободными и равными.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.", "כל בני האדם נולדו בני חורין.",
    "يولد جميع الناس أحرارًا متساوين.", "تمام انسان‌ها آزاد زاده می‌شوند.",
    "सभी मनुष्य स्वतंत्र जन्म लेते हैं।", "সমস্ত মানুষ স্বাধীনভাবে জন্মায়।",
    "மனிதப் பிறவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்.", "మనుష్యులందరూ స్వతంత్రులు.",
    "ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರು.", "മനുഷ്യരെല്ലാം സ്വതന്ത്രരാണ്.", "มนุษย์ทั้งปวงเกิดมามีอิสระ",
    "ມະນຸດທຸກຄົນເກີດມາ", "လူတိုင်းသည်", "មនុស្សទាំងអស់", "བོད་ཡིག", "ყველა ადამიანი იბადება",
    "Բոլոր մարդիկ ծնվում են", "ሰብዓዊ ፍጡራን ሁሉ", "人人生而自由,在尊严和权利上一律平等。", "人人生而自由，在尊嚴和權利上一律平等。",
    "すべての人間は、生まれながらにして自由である。", "モーター・ボート、ｶﾀｶﾅ", "모든 인간은 태어날 때부터 자유롭다.", "ᚠᛇᚻ ᛒᛦᚦ", "𐌰𐌻𐌻𐌰𐌹",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ℝ² ≤ ∑∫", "ﬁne ﬂow ½ ™ Ⅷ ①")
EMOJI = (
    "🙂", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "1️⃣", "❤️ ♥", "text🙂text", "🙂🙂🙂🙂", "👨🏿‍💻 writes 🐍", "⌚️ ✈︎ ☠️",
    "🫠🪿")
SPACES = (
    "  ", "   leading", "trailing   ", "a  b   c    d", "\ttab\t\ttabs", "line\nline\n\nline\n\n\n",
    "\r\nCRLF\r\n\r\nend\r\n", " \n \t \n", "a\u00a0b\u2003c\u200bd", "\u3000全角", "x" + " " * 40 + "y",
    "\n" * 12, "    four\n        eight", "end \n", "\u2028separators\u2029", "a\x0b\x0cb", "▁lower▁bar",
    "  ▁ ▁")
CODE = (
    "def f(x: int) -> None:\n    return x**2  # über\n", "for (int i=0;i<10;++i){a[i]+=b->c;}",
    "if x != y && !z || ~w >= 0x1F_ff:", "\tSELECT * FROM `t` WHERE a<>'b''c';",
    "<div class=\"a\">&nbsp;</div>\r\n", "$HOME/.cache/*.txt | sed -e 's/\\n//g'", "#include <stdio.h>",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case", "C:\\Users\\n\\t",
    "https://example.org/a?b=c&d=%20#e", "user@example.org", "fn main() { println!(\"{:?}\", x); }",
    "a===b?c:d??e", "//// ---- ==== ____ **** ....", "{\"a\": [1, 2.5e-3, null], \"b\": \"\\u00e9\"}",
    "x'y\"z`w", "((((([[[{{{<<<", "->=>::..;;,,!!??", "\\begin{align} x^{2}_{i} \\\\ \\end{align}",
    "<!-- --><?xml version='1.0'?>")
DIGITS = (
    "0", "42", "123", "1234", "12345", "1234567890", "3.14159", "1,234,567.89", "-17%",
    "2026-11-24T20:15:00Z", "٣٤٥ ४५६ 一二三", "v1.2.3-rc4", "10^100", "0x7f 0b1010 1e-9", "$5.00 €3 £2 ¥1",
    "a1b22c333d4444", " 1 22 333 4444", "００１２", "1st 2nd 3rd", "²³⁴ ½¾")
WORDS = (
    "I'm you're we've he'll she'd it's don't", "I'M YOU'RE WE'VE HE'LL SHE'D IT'S DON'T",
    "’s ’t l’eau d’accord", "o'clock 'tis rock'n'roll", "HTMLParser iPhone McDonald eBay XMLHttpRequest",
    "antidisestablishmentarianism", "Donaudampfschifffahrtsgesellschaft", "the The THE tHe", " the", "the ",
    "hello", " hello", "Hello, world!", "co-operate re-enter", "naïve café résumé",
    "nai\u0308ve cafe\u0301 re\u0301sume\u0301", "A\u030a Å \u212b", "가 \u1100\u1161",
    "e\u0301\u0302\u0303\u0304", "Z͑ͫ̓ͪ̂ͫ̽͏̴a̸̧̢l̴g̶o", "ß ẞ ŉ ǰ", "ǅ ǈ ʼn",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababab", "ah ahh ahhhhh", "no,no;no:no",
    "“curly” ‘quotes’ – — …", "e.g. i.e. etc. U.S.A.")
CONTROLS = (
    "\x00", "a\x00b", "\x01\x02\x1b[31mred\x1b[0m", "\x7f\x80\x9f", "\ufeffBOM",
    "\u202eright to left\u202c", "\ufffd\ufffd", "\ue000private\uf8ff", "\U0010fffd", "\u200d\u200c\u2060",
    "\u0378unassigned")
SPECIALS = (
    "<|endoftext|>", "a<|im_start|>user\nb<|im_end|>\n", "<s>[INST] a [/INST] b</s>",
    "<|begin_of_text|><|eot_id|>", "<bos><start_of_turn>user", "<think>a</think>",
    "<|user|>\n<|assistant|>", "<unk><pad>", "[CLS] [SEP] [MASK]", "<|fim_prefix|>", "<0x41><0x0A>",
    "<tool_call>{}</tool_call>", "<|start|>assistant<|channel|>final<|message|>", "<|bos|><|user_start|>",
    "[TOOL_CALLS][ARGS]", "<|", "|>", "< | im_end | >")
TEXTS = (*SCRIPTS, *EMOJI, *SPACES, *CODE, *DIGITS, *WORDS, *CONTROLS, *SPECIALS)
# Where a word begins, and after what, decides most differences: each pair of these beside each other
LEFT = "word", "Été", "42", "'", "\n", "  ", "—", "日本", "🙂", "_"
RIGHT = "word", "ÉTÉ", "1234", "'s", "\n\n", " x", ".", "語", "🙂", "don't"
PAIRS = tuple(left + right for left, right in itertools.product(LEFT, RIGHT))
HARD_TEXTS = (*TEXTS, *PAIRS)
FINGERPRINTED = tuple(text for text in HARD_TEXTS if text not in SPECIALS)  # those differ with added tokens
