"""Numbers with nouns."""

from mgpu_ddp.errors import plural


def test_one_of_a_thing_is_no_plural() -> None:
    assert [plural(number, "image") for number in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]
    assert [plural(number, "class") for number in (1, 3)] == ["1 class", "3 classes"]
