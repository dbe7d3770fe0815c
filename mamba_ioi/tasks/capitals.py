"""Capitals: the country of which a city is the capital."""

from __future__ import annotations

import random

from transformers import PreTrainedTokenizerBase

from .pairs import PromptPairs
from .task import Task, draw_pairs
from .texts import Record
from .words import choice, fill, require, single_tokens

CAPITALS = {
    "Amman": "Jordan",
    "Ankara": "Turkey",
    "Athens": "Greece",
    "Baghdad": "Iraq",
    "Bangkok": "Thailand",
    "Beijing": "China",
    "Beirut": "Lebanon",
    "Belgrade": "Serbia",
    "Berlin": "Germany",
    "Bern": "Switzerland",
    "Brussels": "Belgium",
    "Bucharest": "Romania",
    "Budapest": "Hungary",
    "Cairo": "Egypt",
    "Canberra": "Australia",
    "Caracas": "Venezuela",
    "Copenhagen": "Denmark",
    "Dakar": "Senegal",
    "Dhaka": "Bangladesh",
    "Doha": "Qatar",
    "Dublin": "Ireland",
    "Hanoi": "Vietnam",
    "Havana": "Cuba",
    "Helsinki": "Finland",
    "Islamabad": "Pakistan",
    "Kabul": "Afghanistan",
    "Kathmandu": "Nepal",
    "Lima": "Peru",
    "Lisbon": "Portugal",
    "London": "England",
    "Madrid": "Spain",
    "Moscow": "Russia",
    "Nairobi": "Kenya",
    "Oslo": "Norway",
    "Ottawa": "Canada",
    "Paris": "France",
    "Rabat": "Morocco",
    "Rome": "Italy",
    "Sofia": "Bulgaria",
    "Stockholm": "Sweden",
    "Tehran": "Iran",
    "Tokyo": "Japan",
    "Tripoli": "Libya",
    "Vienna": "Austria",
    "Warsaw": "Poland",
    "Zagreb": "Croatia",
}
TEMPLATE = "We flew to {city}, the capital of"


def capitals(tokenizer: PreTrainedTokenizerBase, n_pairs: int, seed: int) -> PromptPairs:
    """Pairs of a capital and another of as many tokens.

    Marks: ``city`` (its first token) and ``city_end`` (its last one). Group: ``tokens`` of the city. Candidates: all
    countries of which the tokenizer has a single token. Metric: ``logit_diff``.

    Args:
        tokenizer: a transformers tokenizer.
        n_pairs: how many rows.
        seed: of the draw.

    Raises:
        ValueError: if fewer than two countries are single tokens, or no two of their capitals have as many tokens.
    """
    countries = single_tokens(tokenizer, CAPITALS.values())
    require(countries, 2, "the countries", CAPITALS.values())
    cities = [city for city, country in CAPITALS.items() if country in countries]
    encoded = tokenizer([fill(TEMPLATE, {"city": city})[0] for city in cities], add_special_tokens=False)["input_ids"]
    (rest,) = tokenizer(["We flew to, the capital of"], add_special_tokens=False)["input_ids"]
    length = {city: len(ids) - len(rest) for city, ids in zip(cities, encoded, strict=True)}
    alike = {city: [other for other in cities if length[other] == length[city] and other != city] for city in cities}
    usable = [city for city in cities if alike[city]]
    require(usable, 2, "the countries with capitals of as many tokens")

    def draw(rng: random.Random) -> Record:
        city = choice(rng, usable)
        other = choice(rng, alike[city])
        clean, spans = fill(TEMPLATE, {"city": city})
        end = spans["city"][1]
        return {
            "clean": clean,
            "corrupt": fill(TEMPLATE, {"city": other})[0],
            "answer": f" {CAPITALS[city]}",
            "corrupt_answer": f" {CAPITALS[other]}",
            "candidates": [f" {country}" for country in countries],
            "marks": {"city": spans["city"], "city_end": [end - 1, end]},
            "groups": {"tokens": length[city]},
        }

    return draw_pairs(tokenizer, n_pairs, seed, draw)


TASK = Task(
    name="capitals",
    about="a city is the capital of a country: which one",
    function=capitals,
    source="EAP-IG, arXiv 2403.17806",
    example={
        "clean": "We flew to London, the capital of",
        "corrupt": "We flew to Nairobi, the capital of",
        "answer": " England",
        "corrupt_answer": " Kenya",
    },
)
