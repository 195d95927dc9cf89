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
    assert 8 <= len(parts[1]) <= 35
    assert 8 <= len(parts[2]) <= 35
    more = split_by_hash([*ids, "another", "one more"])
    for name in split:
        assert set(split[name]) <= set(more[name])
    assert split == split_by_hash(reversed(ids))


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
