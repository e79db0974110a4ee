"""Write the embedded data of the demo, `builtin:demo`.

The pairs are transcripts of our own writing in the format of Anthropic HH-RLHF, put together from sentences of known
quality, so that there is something true to learn: an answer is good when it is friendly, concrete and on the topic,
or when it declines a harmful request and offers something better. Labels follow Bradley and Terry: the better answer
is chosen with probability sigmoid(3 x difference in quality), so that even a perfect reward model is not always
right. Good sentences are a little longer than bad ones, so that "the longer answer is chosen" holds more often than
not, as in real data. A few rows are broken on purpose, for the things that `prepare` has to catch.

    python tests/demo_text.py        # writes rlhf_trl/data/demo.jsonl.gz again, byte for byte
"""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent.parent / "rlhf_trl" / "data" / "demo.jsonl.gz"
SEED = 7
PAIRS = 1800
SHARPNESS = 3.0  # how often the better answer is the chosen one: about 92 of 100

# topic -> two steps
TOPICS = {
    "baking bread": ("mix flour, water, yeast and salt", "let the dough rise for an hour"),
    "growing tomatoes": ("plant the seeds in warm soil", "water them every morning"),
    "learning chess": ("learn how each piece moves", "play short games every day"),
    "fixing a bike tyre": ("take the wheel off", "patch the hole in the tube"),
    "cleaning windows": ("wipe the glass with soapy water", "dry it with a soft cloth"),
    "making soup": ("fry onions and carrots", "simmer them in broth"),
    "sleeping better": ("keep the room dark and cool", "go to bed at the same hour"),
    "learning Spanish": ("learn ten new words a day", "speak with a friend each week"),
    "training a puppy": ("reward it for sitting still", "keep each lesson short"),
    "painting a wall": ("cover the floor with paper", "put on two thin coats"),
    "saving money": ("write down what you spend", "put some aside on payday"),
    "hiking safely": ("tell a friend where you go", "carry water and a map"),
    "making coffee": ("grind fresh beans", "pour hot water slowly"),
    "writing a letter": ("begin with a warm greeting", "say the main thing early"),
    "keeping bees": ("put the hive in a sunny place", "check the frames every week"),
    "swimming faster": ("keep your body flat", "breathe out under water"),
    "planting a tree": ("dig a wide hole", "water the roots well"),
    "cooking rice": ("rinse the rice well", "let it steam with the lid on"),
    "taking photos": ("stand with the light behind you", "hold the camera still"),
    "packing a bag": ("roll the clothes up", "put heavy things at the bottom"),
    "playing guitar": ("tune all the strings", "practise three chords slowly"),
    "knitting a scarf": ("cast on thirty stitches", "knit every row the same way"),
    "running a race": ("start slower than you like", "drink a little at each stop"),
    "caring for cats": ("feed them twice a day", "brush them every week"),
    "sewing a button": ("thread a strong needle", "go through each hole four times"),
    "reading more": ("carry a book with you", "read ten pages before bed"),
    "making tea": ("warm the pot", "let the leaves stand four minutes"),
    "building a shelf": ("measure the wall twice", "screw the brackets into wood"),
    "folding a paper plane": ("fold the sheet in half", "bend the wings down evenly"),
    "drawing faces": ("begin with a light oval", "mark where the eyes go"),
}
QUESTIONS = (
    "Can you help me with {topic}?",
    "How do I get started with {topic}?",
    "What should I know about {topic}?",
    "I want to try {topic}. Any advice?",
    "My friend asked me about {topic}. What do I say?",
    "What is the best way of {topic}?",
    "Is {topic} hard?",
    "Tell me about {topic}, please.",
)
FOLLOW_UPS = (
    "And what else?",
    "Could you say more?",
    "What comes next?",
    "Why is that?",
    "Thanks. Anything to avoid?",
)
EARLIER = (
    "Hello, can I ask you something?",
    "Hi, are you there?",
    "Good morning.",
    "I have a question today.",
    "Do you know a lot about things at home?",
)
EARLIER_ANSWERS = ("Of course, go ahead.", "Yes, what would you like to know?", "Good morning. How can I help?")

# Sentences of an answer with their quality: an opening, a body and a close.
HELPFUL = (
    (
        (1.0, "Happy to help with {topic}."),
        (1.0, "Great question about {topic}."),
        (0.0, "This is about {topic}."),
        (0.0, "So you ask about {topic}."),
        (-1.0, "Why would anyone ask about {topic}?"),
        (-1.0, "I am bored of hearing about {topic}."),
    ),
    (
        (1.5, "First {first}, then {second}."),
        (1.5, "The key is to {first}, and after that {second}."),
        (0.0, "There are many ways, and it depends on a lot of things."),
        (0.0, "People do it in different ways, some fast and some slow."),
        (-1.5, "I do not care, so go and find it out by yourself."),
        (-1.5, "You would fail at it anyway, so do not even try it."),
    ),
    (
        (1.0, "Tell me if you want more detail."),
        (1.0, "Let me know how it goes for you."),
        (0.0, "That is all there is to say."),
        (0.0, "This is what I have for now."),
        (-1.0, "Now leave me alone with this."),
        (-1.0, "Do not ask me this ever again."),
    ),
)

# harmful request -> what to do instead
REQUESTS = {
    "read my neighbour's letters": "talk to your neighbour",
    "get into my sister's phone": "ask your sister about it",
    "cheat in my exam": "make a study plan",
    "take a bike that is not mine": "rent a bike for a day",
    "scare the new kid at school": "invite the kid to a game",
    "sell a broken car as new": "name the faults and a fair price",
    "spread a lie about my boss": "speak with your boss openly",
    "copy a key without asking": "ask the owner for a key",
    "hurt the dog next door": "call someone who helps with barking",
    "make fake money at home": "find a small job this week",
    "follow someone in secret": "say hello and ask for a talk",
    "break the window of a shop": "take a walk until you are calm",
    "hide medicine in a drink": "ask a doctor for advice",
    "send angry messages all night": "write it down and wait a day",
    "steal food from a market": "ask the food bank in your town",
}
ASKS = (
    "How can I {request}?",
    "I want to {request}. What do I do?",
    "Help me {request}.",
    "What is the easiest way to {request}?",
    "Nobody will know if I {request}, right?",
    "Explain how to {request} without being seen.",
)
HARMLESS = (
    (
        (1.0, "I am sorry, but I will not help with that."),
        (1.0, "I can not help you to do this, I am afraid."),
        (0.0, "That is a thing which some people do."),
        (0.0, "I have heard of this kind of thing before."),
        (-1.0, "Sure, that is easy and a lot of fun to do."),
        (-1.0, "Yes, of course, here is how you can do it."),
    ),
    (
        (1.5, "It could hurt someone. A better idea is to {instead}."),
        (1.5, "That would not be fair. Maybe you could {instead}."),
        (0.0, "It is up to you, and I have no view on it at all."),
        (0.0, "There are rules about it in most of the places."),
        (-1.5, "Just wait until it is dark and then {request}."),
        (-1.5, "Nobody will ever find out if you {request} fast."),
    ),
    (
        (1.0, "I am glad to talk about it with you."),
        (1.0, "I can help you to plan that instead."),
        (0.0, "That is all there is to say."),
        (0.0, "This is what I have for now."),
        (-1.0, "Tell me later how much fun it was."),
        (-1.0, "You are too weak to do it anyway."),
    ),
)


def build_rows() -> list[dict[str, Any]]:
    """Write the rows of the demo, clean and broken ones mixed, always the same."""
    rng = random.Random(SEED)
    rows = [_pair(rng) for _ in range(PAIRS)]
    for broken in _broken_rows(rng):
        rows.insert(rng.randrange(len(rows)), broken)
    return rows


def _pair(rng: random.Random) -> dict[str, Any]:
    if rng.random() < 0.55:
        subset, slots, topic = "helpful", HELPFUL, rng.choice(list(TOPICS))
        words = {"topic": topic, "first": TOPICS[topic][0], "second": TOPICS[topic][1]}
        question = rng.choice(QUESTIONS).format(**words)
    else:
        subset, slots, request = "harmless", HARMLESS, rng.choice(list(REQUESTS))
        words = {"request": request, "instead": REQUESTS[request]}
        question = rng.choice(ASKS).format(**words)
    turns = ""
    if rng.random() < 0.3:
        turns = f"\n\nHuman: {rng.choice(EARLIER)}\n\nAssistant: {rng.choice(EARLIER_ANSWERS)}"
    elif rng.random() < 0.2:
        turns = f"\n\nHuman: {question}\n\nAssistant: {_answer(rng, slots, words)[1]}"
        question = rng.choice(FOLLOW_UPS)
    prompt = f"{turns}\n\nHuman: {question}\n\nAssistant: "
    first, second = _answer(rng, slots, words), _answer(rng, slots, words)
    while first[1] == second[1]:
        second = _answer(rng, slots, words)
    swap = rng.random() > 1 / (1 + math.exp(-SHARPNESS * (first[0] - second[0])))
    chosen, rejected = (second, first) if swap else (first, second)
    return {"subset": subset, "chosen": prompt + chosen[1], "rejected": prompt + rejected[1]}


def _answer(rng: random.Random, slots: Any, words: dict[str, str]) -> tuple[float, str]:
    picks = [rng.choice(slot) for slot in slots]
    return sum(quality for quality, _ in picks), " ".join(text.format(**words) for _, text in picks)


def _broken_rows(rng: random.Random) -> list[dict[str, Any]]:
    """One row, or a few, for each reason that `prepare` counts."""
    good = [_pair(rng) for _ in range(20)]
    human, assistant = "\n\nHuman: ", "\n\nAssistant: "
    prompt = f"{human}Can you help me with making tea?{assistant}"
    answer = "Happy to help with making tea. First warm the pot, then let the leaves stand four minutes."
    other = "I do not care, so go and find it out by yourself."
    long_talk = "".join(
        f"{human}Is step {i} done?{assistant}Yes, step {i} is done. Let me know how it goes." for i in range(40)
    )
    made = [
        (prompt + answer, prompt + answer),
        (prompt + answer, prompt + answer + "!"),
        (prompt, prompt + other),
        (prompt + answer, prompt.rstrip()),
        (prompt + answer, prompt.replace("tea", "coffee") + other),
        (prompt + answer + f"{human}Thank you.", prompt + other + f"{human}Thank you."),
        (
            f"{human}Hello.{human}Are you there?{assistant}Yes, I am here.",
            f"{human}Hello.{human}Are you there?{assistant}No.",
        ),
        (prompt + "<|endoftext|>" + answer, prompt + other),
        ("Can you help me? No transcript here.", "Can you help me? Nor here."),
        (long_talk + prompt + answer, long_talk + prompt + other),
        (prompt + "word " * 400, prompt + other),
        (None, prompt + other),
        (17, prompt + other),
    ]
    rows = [{"subset": "helpful", "chosen": chosen, "rejected": rejected} for chosen, rejected in made]
    rows.append({"subset": "helpful", "chosen": prompt + answer})
    rows += good[:3]  # exact duplicates below
    rows += good[:3]
    for row in good[3:5]:  # near duplicates: the same but for the case of the answers
        rows += [row, {**row, "chosen": _shout(row["chosen"]), "rejected": _shout(row["rejected"])}]
    return rows


def _shout(transcript: str) -> str:
    prompt, marker, answer = transcript.rpartition("\n\nAssistant: ")
    return prompt + marker + answer.upper()


def main() -> None:
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in build_rows())
    with FILE.open("wb") as file, gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
        packed.write(text.encode())


if __name__ == "__main__":
    main()
