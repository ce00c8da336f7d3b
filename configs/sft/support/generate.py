"""Write the demo's data set: support requests in plain words, and the JSON record that routes each.

The same requests become classes (the queue) in configs/classification/support, and pairs of a right and a faulty
answer in configs/reward/support; a manual of the products, and questions that it answers, in configs/rag/support.

    python configs/sft/support/generate.py

Training and held-out requests share no sentence, no product and no order number, so a model that is right on the
held-out ones has learned the task and not the wording. Seeded: running it again writes the same files.
"""

import json
import random
from itertools import chain
from pathlib import Path
from typing import Any

SYSTEM = "Route the request. Reply with JSON only."

# queue -> (training sentences, held-out sentences); {p} is the product
BODIES = {
    "billing": (
        [
            "I was charged twice for the {p}.",
            "The invoice for my {p} shows the wrong amount.",
            "Why does my bill list the {p} at a higher price?",
            "Please correct the payment for the {p}.",
            "My card was debited again for the {p}.",
            "There is a fee on the {p} that nobody told me about.",
            "I paid for the {p} but the receipt never came.",
            "The discount on the {p} is missing from my invoice.",
            "The price on my bill for the {p} is higher than in the shop.",
            "You billed me for two units of the {p}, I bought one.",
            "I was overcharged for the {p}.",
            "My bank shows a second payment for the {p}.",
            "Please explain the amount you charged for the {p}.",
        ],
        [
            "You took the money for the {p} two times.",
            "The total on the receipt for the {p} looks too high.",
            "I see an extra charge next to the {p} on my statement.",
        ],
    ),
    "delivery": (
        [
            "Where is my {p}? It should have arrived last week.",
            "The {p} has not been delivered yet.",
            "Tracking says the {p} is stuck at the depot.",
            "When will the {p} be shipped?",
            "The courier left my {p} at the wrong house.",
            "Can you change the delivery address for the {p}?",
            "My parcel with the {p} is lost.",
            "The {p} is late again, what is going on?",
            "Nobody delivered the {p} today as promised.",
            "The {p} did not come, how long do I have to wait?",
            "Is the {p} on its way?",
            "I expected the {p} on Monday and nothing came.",
        ],
        [
            "I am still waiting for the {p} to arrive.",
            "The driver never showed up with my {p}.",
            "Has the {p} left your warehouse?",
        ],
    ),
    "returns": (
        [
            "I want to send the {p} back.",
            "How can I return the {p} and get a refund?",
            "The {p} is the wrong colour, please take it back.",
            "I ordered the {p} by mistake and would like my money back.",
            "Please give me a return label for the {p}.",
            "The {p} does not fit, I wish to exchange it.",
            "I changed my mind about the {p}, can I return it?",
            "You sent a different {p} than I ordered, I will return it.",
            "Please take the {p} back and refund the money.",
            "I would like to swap the {p} for a bigger one.",
            "I no longer want the {p}, how do I send it to you?",
            "The {p} is too large, can I exchange it?",
        ],
        [
            "I do not want to keep the {p}, please refund me.",
            "How do I ship the {p} back to you?",
            "The {p} is too small, I need to swap it.",
        ],
    ),
    "repair": (
        [
            "The {p} stopped working after a week.",
            "My {p} makes a strange noise.",
            "The {p} does not turn on any more.",
            "A part of the {p} is broken, can you fix it?",
            "The {p} gets very hot and switches itself off.",
            "My {p} has a crack in it, is it under warranty?",
            "The {p} leaks, I need a technician.",
            "The buttons on my {p} no longer react.",
            "Smoke came out of the {p}, it needs a repair.",
            "My {p} broke and will not start.",
            "The {p} crashes all the time.",
            "Something is loose inside my {p}.",
        ],
        [
            "My {p} died yesterday, can someone repair it?",
            "The {p} keeps crashing and smells burnt.",
            "Something inside the {p} came loose and it will not start.",
        ],
    ),
    "sales": (
        [
            "Do you have the {p} in stock?",
            "Is the {p} available in blue?",
            "How much does the {p} cost for ten pieces?",
            "Does the {p} come with a charger?",
            "I would like to buy the {p}, which size do you advise?",
            "Will the {p} be on offer next month?",
            "Can I see the {p} in a shop near me?",
            "What is the difference between the {p} and the older model?",
            "Are more of the {p} coming in soon?",
            "What is the price of three pieces of the {p}?",
            "Would you recommend the {p}? I may buy one.",
            "Can I still buy the {p}?",
        ],
        [
            "Are there any {p} models left to buy?",
            "What would you ask for five of the {p}?",
            "I am thinking of buying the {p}, is it any good?",
        ],
    ),
}
PRODUCTS = (
    [
        "desk lamp", "coffee grinder", "rain jacket", "bike helmet", "office chair", "tea kettle", "garden hose",
        "phone case", "travel bag", "wall clock", "toaster", "hair dryer", "camping tent", "running shoes",
        "water bottle", "guitar stand", "laptop sleeve", "ice cream maker", "steam iron", "baby monitor",
        "electric fan", "air mattress", "knife set", "wool blanket", "bookshelf", "dog bed", "rice cooker",
        "yoga mat", "alarm clock", "tool box", "winter gloves", "mixing bowl", "sewing machine", "lawn mower",
    ],
    [
        "hiking boots", "vacuum cleaner", "night light", "paper shredder", "pizza oven", "ski goggles",
        "kitchen scale", "bird feeder", "piano bench", "picnic basket", "car seat", "heating pad",
    ],
)  # fmt: skip
ORDERS = (
    ["My order is {o}.", "Order number {o}.", "It is order {o}.", "Reference {o}."],
    ["The order id is {o}.", "See order {o}."],
)
DEMANDS = [
    "I need an answer",
    "Please respond",
    "I must hear from you",
    "Fix this",
    "Get back to me",
    "Help me",
    "Call me",
]
TIMES = ["today", "immediately", "at once", "within the hour", "as soon as possible", "before noon", "straight away"]
URGENT = (
    [
        *(f"{demand} {time}." for demand in DEMANDS for time in TIMES),
        "This is urgent.",
        "Please hurry.",
        "I have no time to lose.",
        "I cannot wait any longer.",
        "Quickly, please.",
        "It is very pressing.",
        "Time is short.",
        "There is no time.",
        "Do not make me wait.",
        "Hurry up, please.",
    ],
    ["It cannot wait.", "Please reply right now."],
)
CALM = (
    ["There is no hurry.", "Take your time.", "Next week is fine.", "It is not urgent.", "Whenever you have a moment."],
    ["No rush.", "I can wait."],
)  # fmt: skip
OPENINGS = (["Hello.", "Hi there.", "Good morning.", "Dear team,", ""], ["Hey,", "Good evening.", ""])
CLOSINGS = (["Thanks.", "Kind regards, Ann", "Thank you very much.", "", ""], ["Cheers, Bo", "Many thanks.", ""])


def records(number: int, held_out: bool, generator: random.Random) -> list[dict[str, Any]]:
    """Distinct records of one side.

    Args:
        number: How many.
        held_out: Draw from the held-out wording instead of the training wording.
        generator: Source of all choices.
    """
    side = int(held_out)
    found: dict[str, dict[str, Any]] = {}
    while len(found) < number:
        queue = list(BODIES)[len(found) % len(BODIES)]
        product = generator.choice(PRODUCTS[side])
        # Training numbers are even and held-out numbers odd, so that none stands on both sides.
        order = f"{generator.choice('ABCKRT')}{generator.randrange(100, 1000) * 2 + side}"
        has_order, urgent = generator.random() < 0.6, generator.random() < 0.4
        parts = [
            generator.choice(OPENINGS[side]),
            generator.choice(BODIES[queue][side]).format(p=product),
            generator.choice(ORDERS[side]).format(o=order) if has_order else "",
            generator.choice(URGENT[side]) if urgent else generator.choice([*CALM[side], "", "", ""]),
            generator.choice(CLOSINGS[side]),
        ]
        route = {"queue": queue, "product": product, "order": order if has_order else None, "urgent": urgent}
        request = " ".join(filter(None, parts))
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": request},
            {"role": "assistant", "content": json.dumps(route)},
        ]
        found.setdefault(request, {"id": f"{'test' if held_out else 'train'}-{len(found)}", "messages": messages})
    return list(found.values())


def classes(chats: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The requests alone, each with its queue as the label."""
    found = []
    for chat in chats:
        request, answer = chat["messages"][1:]
        found.append({"id": chat["id"], "messages": [request], "label": json.loads(answer["content"])["queue"]})
    return found


def pairs(chats: list[dict[str, Any]], generator: random.Random) -> list[dict[str, Any]]:
    """The right answer against one that breaks the form, or routes to another queue; the form weighs more."""
    found = []
    for chat in chats:
        *context, chosen = chat["messages"]
        route = json.loads(chosen["content"])
        fault = generator.choice(("prose", "missing", "queue"))
        match fault:
            case "prose":
                content = f"Sure! I think the {route['queue']} team should look at the {route['product']}."
            case "missing":
                content = json.dumps({"queue": route["queue"], "product": route["product"]})
            case "queue":
                other = generator.choice([queue for queue in BODIES if queue != route["queue"]])
                content = json.dumps(route | {"queue": other})
        rejected = {"role": "assistant", "content": content}
        margin = 0.5 if fault == "queue" else 1.0
        pair = {"id": chat["id"], "context": context, "chosen": chosen, "rejected": rejected, "margin": margin}
        found.append(pair | {"subset": fault})
    return found


ASKED = (["Which code resets the {p}?", "Reset code of the {p}?", "How do I reset the {p}?"], ["I must reset the {p}."])


def manual(generator: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Passages of a manual, questions that train, and the same asked in other words."""
    products = [*PRODUCTS[0], *PRODUCTS[1]]
    codes = dict(zip(products, generator.sample(range(100, 1000), len(products)), strict=True))
    passages = [
        {"id": product.replace(" ", "-"), "title": product, "text": f"The {product} is reset with code {code}."}
        for product, code in codes.items()
    ]
    sides: list[list[dict[str, Any]]] = [[], []]
    for side, questions in enumerate(ASKED):
        for passage in passages:
            for number, question in enumerate(questions):
                asked = {"role": "user", "content": question.format(p=passage["title"])}
                answer = {"role": "assistant", "content": str(codes[passage["title"]])}
                name = f"{passage['id']}-{number}"
                sides[side].append({"id": name, "messages": [asked, answer], "relevant": [passage["id"]]})
    return passages, *sides


def reading(number: int, held_out: int, generator: random.Random) -> list[dict[str, Any]]:
    """Questions behind the passage that answers them, with a new code each time: a lesson in reading.

    Questions are trained too, but for those held out: they repeat the product, and what copies that has begun to read.
    """
    found = []
    for index in range(number):
        product, code = generator.choice([*PRODUCTS[0], *PRODUCTS[1]]), generator.randrange(100, 1000)
        passage = f"{product}\nThe {product} is reset with code {code}."
        question = generator.choice(ASKED[0]).format(p=product)
        asked: dict[str, Any] = {"role": "user", "content": f"{passage}\n\n{question}"}
        if index < number - held_out:
            asked["train"] = True
        messages = [asked, {"role": "assistant", "content": str(code)}]
        found.append({"id": f"reading-{index}", "messages": messages})
    return found


def files() -> dict[str, list[dict[str, Any]]]:
    """Records by file, under configs/."""
    generator = random.Random(7)
    written: dict[str, list[dict[str, Any]]] = {}
    for name, number, held_out in (("train", 400, False), ("test", 100, True)):
        written[f"sft/support/{name}.jsonl"] = records(number, held_out, generator)
    for name in ("train", "test"):
        chats = written[f"sft/support/{name}.jsonl"]
        written[f"classification/support/{name}.jsonl"] = classes(chats)
        written[f"reward/support/{name}.jsonl"] = pairs(chats, random.Random(name))
    names = ("passages", "train", "test")
    written |= {f"rag/support/{name}.jsonl": part for name, part in zip(names, manual(random.Random(7)), strict=True)}
    written["rag/support/reading.jsonl"] = reading(1200, 100, random.Random(1))
    return written


def main() -> None:
    """Write all files."""
    for name, content in files().items():
        path = Path(__file__).parents[2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in content), encoding="utf-8")


def wordings(side: int) -> set[str]:
    """Every sentence, product and phrase that one side is made of; 0 is training, 1 held out."""
    phrases = (ORDERS[side], URGENT[side], CALM[side], PRODUCTS[side], *(body[side] for body in BODIES.values()))
    return set(chain.from_iterable(phrases))


if __name__ == "__main__":
    main()
