"""Patient splits: stable, disjoint, complete."""

import pytest

from xray2ct.data.splits import check_split, split_by_hash, split_hash
from xray2ct.files import InputError


def test_split_by_hash_is_stable_complete_and_disjoint():
    ids = [f"patient{i}" for i in range(200)]
    split = split_by_hash(ids)
    parts = [set(split[name]) for name in ("train", "val", "test")]
    assert set.union(*parts) == set(ids)
    assert sum(map(len, parts)) == 200
    assert (len(parts[1]), len(parts[2])) == (20, 20)
    more = split_by_hash([*ids, "another", "one more"])
    stayed = sum(len(set(split[name]) & set(more[name])) for name in split)
    assert stayed >= 196  # two more move the borders of test and validation by two ranks at most
    assert split == split_by_hash(reversed(ids))


@pytest.mark.parametrize(("count", "val", "test"), [(25, 2, 2), (200, 20, 20), (1000, 100, 100), (35, 4, 4)])
def test_fractions_are_exact(count, val, test):
    split = split_by_hash([f"patient{i}" for i in range(count)])
    assert {name: len(split[name]) for name in split} == {"train": count - val - test, "val": val, "test": test}
    assert split != split_by_hash([f"patient{i}" for i in range(count)], seed=1)


def test_one_person_is_never_on_two_sides():
    ids = [f"scan{i}" for i in range(40)]
    persons = {patient: f"person{i // 2}" for i, patient in enumerate(ids)}
    split = split_by_hash(ids, 0.25, 0.25, persons=persons)
    assert {name: len(split[name]) for name in split} == {"train": 20, "val": 10, "test": 10}
    sides = [{persons[patient] for patient in patients} for patients in split.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 20


def test_an_earlier_split_is_kept_and_new_patients_fill_it_up():
    before = {"train": [f"a{i}" for i in range(10)], "val": ["v"], "test": ["t"]}
    kept = {patient: name for name, patients in before.items() for patient in patients}
    new = [f"b{i}" for i in range(28)]
    split = split_by_hash([*kept, *new], kept=kept)
    assert all(set(before[name]) <= set(split[name]) for name in before)
    assert {name: len(split[name]) for name in split} == {"train": 32, "val": 4, "test": 4}  # a tenth of 40
    assert split_by_hash([*kept, "b1"], persons={"b1": "t"}, kept=kept)["test"] == ["b1", "t"]  # t's person
    full = {f"v{i}": "val" for i in range(9)}
    assert split_by_hash([*full, "b1"], kept=full) == {"train": [], "val": sorted(full), "test": ["b1"]}


@pytest.mark.parametrize("count", [3, 4, 7])
def test_small_data_sets_still_get_validation_and_test_patients(count):
    split = split_by_hash([f"x{i}" for i in range(count)])
    assert all(split[name] for name in split)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"train": ["a", "b"], "val": ["b"], "test": ["c"]}, "listed more than once: b"),
        ({"train": ["a", "b"], "val": ["c"], "test": ["d"]}, "listed but not found: d"),
        ({"train": ["a"], "val": ["b"], "test": []}, "found but not listed: c"),
        ({"training": ["a", "b", "c"]}, "exactly the keys train, val and test"),
        ({"train": "abc", "val": [], "test": []}, "train must be a list"),
    ],
)
def test_bad_splits_are_named(split, words):
    with pytest.raises(InputError, match=rf"split\.json.*{words}"):
        check_split(split, ["a", "b", "c"], "split.json")


def test_the_hash_names_the_split_whatever_the_order_of_its_keys():
    one = {"train": ["a"], "val": ["b"], "test": []}
    assert split_hash(one) == split_hash(dict(reversed(one.items())))
    assert split_hash(one) != split_hash({"train": ["b"], "val": ["a"], "test": []})
