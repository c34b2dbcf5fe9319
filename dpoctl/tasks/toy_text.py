"""The toy task's film reviews, generated offline from a small grammar and a seed. Standard library only.

A review opens neutrally, judges a few aspects of the film, and ends in a verdict. The verdict sets its label; the
aspects mostly agree with it and sometimes do not, as in real reviews. The log-odds that it is positive are the sum of
the weights of its judgements and its verdict.
"""

import math
import random
import re

_SLOT = re.compile(r"<([a-z_]+)>")

# The clause's polarity selects the list of these slots: <adj> becomes adj_good or adj_bad.
_POLAR = {"adj", "adv", "verdict", "noun", "effect", "claim", "twist", "aside", "comparison"}

GRAMMAR: dict[str, list[str]] = {
    # --- neutral -------------------------------------------------------------------------------------------
    "opening": [
        "I saw <film> <occasion>", "I watched <film> <occasion>", "We went to see <film> <occasion>",
        "<film> is a <genre> from <year> about <subject>", "This <genre> tells the story of <subject>",
        "<person> stars in <film> as <subject>", "<person> plays <subject> in this <genre>",
        "My <relative> told me about <film>", "My <relative> and I rented <film> <occasion>",
        "In <film> , <subject> <plot>", "The <genre> <film> came out in <year>",
        "Set in <place> , <film> follows <subject>", "After <number> years I watched <film> again",
        "<person> directed <film> in <year>", "The plot is simple : <subject> <plot>",
        "There is a scene in <film> where <subject> <plot>", "When I heard of a <genre> set in <place> , I was curious",
        "<film> was on television <occasion>", "Here is a <genre> with <person> and <person>",
        "It was my <relative> who chose this <genre>", "Before <film> , <person> was known for <genre> pictures",
        "I had read the book before I saw <film>", "Most people know <person> from <film>",
    ],
    "neutral": [
        "The story begins in <place> , where <subject> <plot>", "Then <subject> <plot>",
        "<person> plays <subject>", "It runs for about <number> minutes", "The rest takes place in <place>",
        "Halfway through , <subject> <plot>", "<person> wrote the script and <person> the music",
        "It was filmed in <place> in <year>", "The other main part is <subject> , played by <person>",
        "In the end <subject> <plot>",
    ],
    "film": ["<title>", "<title>", "<title>", "<title>", "<title>", "<title>", "this film", "this movie",
             "this picture", "it"],
    "title": ["The <title_adj> <title_noun>", "<title_adj> <title_noun>", "The <title_noun> of <title_name>",
              "A <title_noun> in <title_name>", "<title_noun> and <title_noun>", "<title_name> <title_noun>"],
    "title_adj": ["Last", "Quiet", "Glass", "Hollow", "Red", "Copper", "Second", "Borrowed", "Northern", "Winter",
                  "Paper", "Broken", "Silent", "Golden", "Seventh", "Lost", "Blue", "Iron", "Secret", "Frozen",
                  "Burning", "Crooked"],
    "title_noun": ["Harbour", "Station", "Orchard", "Ferry", "Lantern", "Engine", "Salt", "Bridge", "Meadow", "Street",
                   "Sky", "Coat", "Piano", "Line", "Ledger", "Witness", "Garden", "Letter", "Winter", "Mirror", "River",
                   "Island"],
    "title_name": ["Lisbon", "Marrow Lane", "Vienna", "October", "Kansas", "Saint Clair", "Tuesday", "Cairo", "Dover",
                   "Nevada", "Prague", "Monday"],
    "genre": ["thriller", "comedy", "drama", "western", "romance", "mystery", "horror film", "musical", "war film",
              "science fiction film", "road movie", "family film", "crime story", "costume drama"],
    "person": ["<first> <last>"],
    "first": ["Anna", "Tom", "Maria", "Peter", "Grace", "Daniel", "Helen", "Victor", "Ruth", "Simon", "Clara", "Omar",
              "Julia", "Frank", "Nina", "Arthur", "Irene", "Hugo", "Martha", "Leo", "Vera", "Oscar"],
    "last": ["Keller", "Ashby", "Voss", "Lindqvist", "Okoro", "Reyes", "Marsh", "Sandoval", "Adler", "Blake", "Novak",
             "Haddad", "Brandt", "Doyle", "Petrova", "Webb", "Castle", "Moreau", "Tanaka", "Quinn", "Silva", "Bergman"],
    "subject": ["a young doctor", "two brothers", "a retired detective", "a lonely farmer", "a piano teacher",
                "a thief", "an old sailor", "three friends", "a mother of four", "a lost child", "a nervous banker",
                "a soldier", "the village priest", "a travelling salesman", "a famous painter", "an unhappy queen",
                "a taxi driver", "a girl with a secret", "a scientist", "the new neighbour"],
    "plot": ["finds a letter", "loses everything in one night", "must leave the city", "falls in love with a stranger",
             "is accused of a murder", "comes home after the war", "hides a stolen painting", "opens a small hotel",
             "looks for a missing sister", "makes a deal with the mayor", "is followed by the police",
             "learns the truth about the family", "buys an old boat", "takes the wrong train", "inherits a house",
             "starts a new life", "meets an old enemy", "discovers a strange machine"],
    "place": ["Paris", "a small town in Ohio", "the desert", "a mountain village", "London", "an abandoned factory",
              "the south of Italy", "New York", "a hospital", "a ship at sea", "Berlin", "a boarding school",
              "the suburbs", "a fishing port", "Buenos Aires"],
    "occasion": ["last night", "on a rainy Sunday", "with my brother", "at a festival", "on a long flight",
                 "in the cinema", "with the whole family", "when I was twelve", "because of the poster",
                 "on a Friday evening", "without knowing anything about it", "with some friends",
                 "at two in the morning", "for a class"],
    "relative": ["brother", "sister", "father", "wife", "husband", "neighbour", "best friend", "teacher", "cousin",
                 "boss"],
    "year": [str(y) for y in range(1948, 2012, 3)],
    "number": ["ten", "twenty", "ninety", "a hundred", "eighty", "thirty", "five", "forty", "three"],
    # --- judgement ------------------------------------------------------------------------------------------------
    "judgement": [
        "the <aspect> is <degree> <adj>", "the <aspect> was <adj> and <adj>", "I found the <aspect> <degree> <adj>",
        "the <aspect> <effect>", "<person> gives a <adj> performance", "<person> is <degree> <adj> here",
        "the <aspect> , by <person> , <effect>", "there is something <adj> about the <aspect>",
        "the scenes in <place> are <degree> <adj>", "<claim>", "the <aspect> <adv> <does>", "what a <adj> <aspect>",
        "the <aspect> <effect> and the <aspect> <effect>", "every scene with <person> is <adj>",
        "it has a <adj> <aspect> and a <adj> <aspect>", "<twist>", "<aside>",
    ],
    "aspect": ["acting", "script", "music", "photography", "dialogue", "pacing", "story", "ending", "direction",
               "humour", "costume design", "editing", "romance", "sound", "cast", "opening scene", "plot",
               "camera work", "soundtrack"],
    "degree": ["really", "quite", "simply", "truly", "rather", "surprisingly", "often", "always", "very", "so"],
    "does": ["carries the film", "holds it together", "serves the story", "speaks to the audience", "fits the period"],
    "adj_good": ["wonderful", "brilliant", "moving", "charming", "clever", "beautiful", "funny", "gripping", "honest",
                 "warm", "superb", "memorable", "elegant", "fresh", "touching", "excellent", "delightful", "subtle",
                 "powerful", "great", "lovely", "impressive", "fine", "rich"],
    "adj_bad": ["terrible", "dull", "clumsy", "boring", "awful", "silly", "predictable", "lifeless", "annoying",
                "cheap", "weak", "pointless", "wooden", "tedious", "stupid", "flat", "confusing", "lazy", "ugly",
                "painful", "bad", "empty", "shallow", "tired"],
    "adv_good": ["beautifully", "quietly", "perfectly", "gracefully", "always", "brilliantly"],
    "adv_bad": ["never", "hardly", "rarely", "barely", "almost never", "no longer"],
    "noun_good": ["masterpiece", "gem", "pleasure", "joy", "triumph", "small wonder", "delight", "classic"],
    "noun_bad": ["disaster", "mess", "waste of time", "disappointment", "failure", "bore", "disgrace", "joke"],
    "effect_good": ["moved me to tears", "made me laugh", "works from start to finish", "stays with you",
                    "is not bad at all", "gets better and better", "never fails", "kept me awake with excitement",
                    "is a pleasure", "deserves an award", "won me over", "is worth the ticket alone"],
    "effect_bad": ["bored me to sleep", "made me cringe", "falls apart", "goes nowhere", "is not good at all",
                   "gets worse and worse", "never works", "gave me a headache", "is a pain to follow",
                   "deserves to be forgotten", "lost me early", "left me cold"],
    "claim_good": ["I cared about every one of them", "not a minute is wasted", "you will not regret it",
                   "I laughed until it hurt", "it is hard to find a fault", "nobody could have done it better"],
    "claim_bad": ["I did not care about any of them", "every minute is wasted", "you will regret it",
                  "I did not laugh once", "it is hard to find a virtue", "anybody could have done it better"],
    "twist_good": ["what could have been dull turns out <adj>", "I expected nothing and was <adv> surprised",
                   "far from boring , it is <adj>"],
    "twist_bad": ["what could have been great turns out <adj>", "I expected a lot and was let down",
                  "far from brilliant , it is <adj>"],
    "aside_good": ["even my <relative> loved it", "my <relative> could not stop smiling", "the audience cheered"],
    "aside_bad": ["even my <relative> hated it", "my <relative> wanted to leave", "half the audience walked out"],
    "comparison_good": ["far better than <film>", "as good as anything by <person>", "the best <genre> since <year>"],
    "comparison_bad": ["far worse than <film>", "the weakest thing by <person>", "the worst <genre> since <year>"],
    "verdict_good": ["All in all , a <adj> <genre>", "I loved it", "Highly recommended", "A <adj> <noun> , do see it",
                     "It is a <noun>", "I would watch it again tomorrow", "<comparison>", "Go and see it",
                     "In short , a <noun>", "One of my favourites , <comparison>", "I recommend it to everyone",
                     "Eight out of ten", "Nine out of ten", "Thank you , <person>", "Do not miss it"],
    "verdict_bad": ["All in all , a <adj> <genre>", "I hated it", "Not recommended", "A <adj> <noun> , stay away",
                    "It is a <noun>", "I would not watch it again for money", "<comparison>", "Save your money",
                    "In short , a <noun>", "One of the worst , <comparison>", "I recommend it to nobody",
                    "Three out of ten", "Two out of ten", "Shame on you , <person>", "Avoid it"],
    "turn": ["But", "However ,", "On the other hand ,", "Still ,", "Sadly or not ,", "Even so ,"],
    "link": ["Also ,", "And", "Besides ,", "Above all ,", "For me", "To be fair ,", "I must say", "Honestly ,", "", "",
             "", ""],
}  # fmt: skip


_JUDGEMENT, _VERDICT = 0.75, 2.0  # log-odds


def reviews(n: int, seed: int) -> list[dict]:
    """`n` reviews {"text", "label": POSITIVE or NEGATIVE, "rating": 1 to 10, "positive": probability of POSITIVE}.

    Every second review is positive; the i-th depends on (seed, i) only.
    """
    return [_review(("good", "bad")[i % 2], random.Random(f"toy {seed} {i}")) for i in range(n)]


def _review(label: str, rng: random.Random) -> dict:
    agreement = rng.choice((0.65, 0.8, 0.95))
    sentences = [_expand("opening", "", rng)]
    if rng.random() < 0.35:
        sentences.append(_expand("neutral", "", rng))
    previous, agreed = None, 0
    weight = {label: _VERDICT, _other(label): 0.0}
    count = rng.choice((1, 1, 2, 2))
    for _ in range(count):
        polarity = label if rng.random() < agreement else _other(label)
        agreed += polarity == label
        weight[polarity] += _JUDGEMENT
        start = _expand("turn" if previous and polarity != previous else "link", "", rng)
        clause = _expand("judgement", polarity, rng)
        if rng.random() < 0.2:
            second = _other(polarity) if rng.random() < 0.4 else polarity
            weight[second] += _JUDGEMENT
            clause += (" , but " if second != polarity else " , and ") + _expand("judgement", second, rng)
        sentences.append(f"{start} {clause}")
        previous = polarity
    sentences.append(_expand("verdict", label, rng))
    strength = round(4 * agreed / count * rng.uniform(0.6, 1.0))
    rating = 6 + strength if label == "good" else 5 - strength
    text = " ".join(_sentence(s, rng) for s in sentences)
    positive = 1 / (1 + math.exp(weight["bad"] - weight["good"]))
    return {
        "text": text,
        "label": "POSITIVE" if label == "good" else "NEGATIVE",
        "rating": rating,
        "positive": round(positive, 4),
    }


def _other(polarity: str) -> str:
    return "bad" if polarity == "good" else "good"


def _expand(symbol: str, polarity: str, rng: random.Random) -> str:
    name = f"{symbol}_{polarity}" if symbol in _POLAR else symbol
    return _SLOT.sub(lambda slot: _expand(slot[1], polarity, rng), rng.choice(GRAMMAR[name]))


def _sentence(text: str, rng: random.Random) -> str:
    text = re.sub(r" ([,:])", r"\1", " ".join(text.split()))
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:] + rng.choice((".", ".", ".", ".", ".", "!"))
