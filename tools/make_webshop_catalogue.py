"""Write a made-up catalogue in WebShop's file format, where its data cannot be downloaded.

    python tools/make_webshop_catalogue.py --out catalogue --products 1000 --seed 0

    items_shuffle_1000.json    the products: name, category, price, options, texts
    items_ins_v2_1000.json     attributes of each, and an instruction for the synthetic goals
    items_human_ins.json       two instructions a product, in the shape of those that people wrote
    documents.jsonl            what pyserini indexes: `python -m pyserini.index.lucene --collection JsonCollection ...`

Every brand sells a kind of thing once, so that a product's full name finds it. Prices are single ones, ranges and none
at all; a few options hold a slash, capital letters or brackets, as real ones do, but no goal asks for one with brackets,
which WebShop cannot click. The same arguments write the same bytes.

The things, brands and instructions are invented here: figures on this catalogue are not figures on WebShop.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

THINGS = {
    "Clothing › Shoes": ("sneaker", "sandal", "boot", "slipper", "loafer"),
    "Clothing › Tops": ("hoodie", "t-shirt", "sweater", "cardigan", "blouse"),
    "Home › Furniture": ("bookcase", "nightstand", "footstool", "desk chair", "coat rack"),
    "Home › Bedding": ("pillowcase", "duvet cover", "blanket", "mattress pad", "bed skirt"),
    "Electronics › Audio": ("headphone", "soundbar", "microphone", "turntable", "earbud"),
    "Electronics › Cables": ("charging cable", "adapter", "extension lead", "usb hub", "power bank"),
    "Kitchen › Tools": ("skillet", "kettle", "cutting board", "whisk", "saucepan"),
    "Beauty › Hair": ("shampoo", "hair dryer", "hairbrush", "conditioner", "curling iron"),
    "Garden › Tools": ("watering can", "trowel", "pruning shear", "rake", "hose reel"),
    "Sports › Camping": ("tent", "sleeping bag", "lantern", "camp stove", "backpack"),
}
BRANDS = (
    "Alderon", "Brixel", "Caspira", "Dunmore", "Elvant", "Fjordly", "Grenmar", "Hartwell", "Ilvane", "Jorvik",
    "Kestrel", "Lumora", "Marwick", "Norsund", "Oakhelm", "Pellant", "Quenby", "Rivona", "Solmark", "Tarrow",
    "Umbrio", "Velmont", "Wexcombe", "Xandria", "Yarrowe", "Zelphine", "Ashgrove", "Birkdale", "Coldstream", "Dovecote",
)  # fmt: skip
ATTRIBUTES = (
    "machine washable", "non slip", "easy to clean", "long lasting", "light weight", "heavy duty", "water resistant",
    "high quality", "easy to assemble", "eco friendly", "quick release", "noise free", "dust proof", "hand made",
    "fade resistant", "double sided",
)  # fmt: skip
COLOURS = ("Black", "navy", "olive", "crimson", "teal", "black/white", "sand [matte]")
SIZES = ("small", "medium", "Large", "x-large", "2 pack", "queen/full")
WORDS = "sturdy simple bright soft neat compact modern classic warm smooth handy plain tidy quiet".split()
BRACKETS = set("[]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    written = write_catalogue(options.out, num_products=options.products, seed=options.seed)
    print(f"{written} products and {2 * written} human instructions in {options.out}")


def write_catalogue(out: Path, *, num_products: int, seed: int) -> int:
    """Write the four files into `out`; how many products they hold. ValueError for more than there can be."""
    kinds = [(category, thing) for category, things in THINGS.items() for thing in things]
    pairs = [(brand, *kind) for brand in BRANDS for kind in kinds]
    if not 0 < num_products <= len(pairs):
        raise ValueError(f"--products {num_products}; expected 1 to {len(pairs)}")
    rng = random.Random(f"catalogue/{seed}")
    rng.shuffle(pairs)
    products = [draw_product(rng, number, *pair) for number, pair in enumerate(pairs[:num_products])]
    attributes = {one["asin"]: rng.sample(ATTRIBUTES, 4) for one in products}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "items_shuffle_1000.json", products)
    write_json(out / "items_ins_v2_1000.json", {
        one["asin"]: {
            "attributes": attributes[one["asin"]],
            "instruction": f"Find a {one['query']} that is {attributes[one['asin']][0]}",
            "instruction_attributes": attributes[one["asin"]][:1],
        }
        for one in products
    })
    write_json(out / "items_human_ins.json", {
        one["asin"]: [draw_instruction(rng, one, attributes[one["asin"]]) for _ in range(2)] for one in products
    })
    lines = (json.dumps({"id": one["asin"], "contents": contents(one), "product": one}) for one in products)
    (out / "documents.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return num_products


def draw_product(rng: random.Random, number: int, brand: str, category: str, thing: str) -> dict[str, Any]:
    """A product as WebShop's file has it."""
    style = " ".join(rng.sample(WORDS, 2))
    low = rng.randint(300, 20000) / 100
    price = rng.choice(["", f"${low:.2f}", f"${low:.2f}", f"${low:.2f} to ${low * 1.5:.2f}"])
    options = {"color": rng.sample(COLOURS, rng.randint(2, 4)), "size": rng.sample(SIZES, rng.randint(2, 4))}
    kept = {name: options[name] for name in rng.choice([(), ("color",), ("size",), ("color", "size")])}
    return {
        "asin": f"B{number:05d}{rng.randint(1000, 9999)}",
        "name": f"{brand} {style} {thing}",
        "category": category.split(" › ")[0].lower(),
        "query": thing,
        "product_category": f"{category} › {thing.title()}",
        "pricing": price,
        "full_description": f"A {style} {thing} by {brand}.",
        "small_description": [f"{style} {thing}", f"made by {brand}"],
        "customization_options": {
            name: [{"value": value, "image": None} for value in values] for name, values in kept.items()
        },
        "images": [f"https://example.org/{number}.jpg"],
    }


def draw_instruction(rng: random.Random, product: dict[str, Any], attributes: list[str]) -> dict[str, Any]:
    """A wish that the product fulfils, as people's instructions are stored: attributes and option values."""
    wanted = rng.sample(attributes, 2)
    chosen = [
        rng.choice([label for entry in entries if not BRACKETS & set(label := option_label(entry["value"]))])
        for entries in product["customization_options"].values()
    ]
    choice = f", in {' and '.join(chosen)}" if chosen else ""
    return {
        "instruction": f"Buy me a {product['query']} that is {wanted[0]} and {wanted[1]}{choice}.",
        "instruction_attributes": wanted,
        "instruction_options": chosen,
    }


def option_label(value: str) -> str:
    """An option's value as WebShop shows it."""
    return value.strip().replace("/", " | ").lower()


def contents(product: dict[str, Any]) -> str:
    """The text by which a product is found."""
    options = ", and ".join(
        f"{name}: {', '.join(option_label(entry['value']) for entry in entries)}"
        for name, entries in product["customization_options"].items()
    )
    texts = (product["name"], product["full_description"], product["small_description"][0], options)
    return " ".join(texts).lower()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
