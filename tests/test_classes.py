import pytest

from lib.classes import MAX_CLASSES, NYUV2_13, NYUV2_40, check_same_classes


def test_nyuv2_class_sets_have_13_and_40_unique_names():
    for classes, count in ((NYUV2_13, 13), (NYUV2_40, 40)):
        assert len(set(classes)) == len(classes) == count <= MAX_CLASSES
    assert NYUV2_13[1] == "books"
    assert NYUV2_13[9] == "table"


def test_error_shows_the_first_class_that_differs():
    check_same_classes(("a", "b"), ("a", "b"), "one", "other")
    check_same_classes(("a", "b"), ["a", "b"], "one", "other")
    with pytest.raises(ValueError) as error:
        check_same_classes(("a", "b", "c", "d"), ("a", "x", "c", "y"), "run 'one'", "run 'two'")
    assert str(error.value) == (
        "classes: run 'one' has 'b' as class 1, run 'two' has 'x' as class 1; use what has the same classes"
    )
    with pytest.raises(ValueError) as error:
        check_same_classes(("a", "b"), ("a", "b", "c"), "the network", "the data")
    assert str(error.value) == (
        "classes: the network has 2 (the last is 'b'), the data has 3 (the last is 'c'); use what has the same classes"
    )
